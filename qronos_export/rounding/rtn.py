"""Round to nearest, on scales searched with diag H as importance."""

from __future__ import annotations

import torch
from torch import Tensor

from formats import BlockFormat, QuantizedWeight
from qronos_export.rounding.rounded import Rounded, Settings
from qronos_export.statistics import LayerStats


def rtn(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings, *, note: str = "") -> Rounded:
    """Nearest stored value of every weight [rows, columns] on its own. Without tokens, and where
    their statistics overflowed, all columns weigh alike."""
    fmt.check(weight.shape[1])
    hessian = stats.hessian if stats.tokens else None
    if hessian is not None and not bool(torch.isfinite(hessian).all()):
        hessian = None
    blocks = fmt.quantize(weight, None if hessian is None else hessian.diagonal())
    error = fmt.dequantize(blocks).sub_(weight)
    loss = torch.linalg.vecdot(error if hessian is None else error @ hessian, error)
    rows, columns = weight.shape
    return Rounded(QuantizedWeight(fmt, blocks, (rows, columns)), loss, None, 0.0, "rtn", note)


def blind(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings) -> Rounded:
    """`rtn` as if there were no statistics, for comparison with methods that use them."""
    return rtn(weight, LayerStats(0), fmt, settings)
