"""GPTAQ (arXiv 2504.02692): GPTQ with an asymmetric term, what the float stream's inputs say that the quantized do not.

When column t is rounded, the output error w_t (X − X̂)_t of its drifted input is handed to the columns after it, solved
for on those alone. With w_t the float model's weight it does not depend on codes, so all is added before the sweep
(others hand on what has become of w_t by then):

    V = W + W P,   P = ((G − H) Uᵀ ⊙ strictly upper) U

Qronos solves for all columns at once, those before t and t itself among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats import BlockFormat
from qronos_export.rounding.gptq import calibrated, diffuse
from qronos_export.rounding.least_squares import Normal
from qronos_export.rounding.rounded import Rounded, Settings


@calibrated
def gptaq(weight: Tensor, normal: Normal, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns]; `settings.shrinkage` scales the asymmetric term."""
    _, mismatch = normal.project(weight, 0.0, settings.ridge)
    drift = (normal.cross - normal.hessian).to(normal.upper.dtype)
    order = torch.arange(len(drift), device=drift.device) if normal.order is None else normal.order
    passed_on = (drift[order][:, order] @ normal.upper.T).triu(1) @ normal.upper
    target = weight.clone()
    target[:, order] += settings.shrinkage * (weight[:, order] @ passed_on.to(weight.dtype))
    return diffuse(target, normal, fmt, "gptaq", mismatch, settings)
