"""What matrix products are computed in, and by which library.

Forwards multiply in float32, or in bfloat16, for which many processors have faster units. Hidden states, norms and
attention stay as they are, and so do statistics; of a linear layer inputs, weights and what comes out are rounded to
eight bits of precision.

Products of float32 are of whole float32 either way. On a CPU oneDNN computes them where torch has it, since the MKL
that torch takes by itself uses half of an AMD processor's vectors, and nothing is lost on others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""F.linear of inputs [..., in], a weight [out, in] and a bias [out] or None."""

_WORTH_IT = 1 << 20  # multiplications; of fewer, setting out takes longer than what is gained


def linear(compute: str) -> Linear:
    return _in_bfloat16 if compute == "bfloat16" else _in_float32


def hasten(model: nn.Module) -> None:
    """Have the linear layers of `model` multiply as `linear` does in float32, where no gradient is asked for."""
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__class__ = _Linear  # a forward of its own would make a cycle, and keep its weight alive


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [..., m] of a [..., k] and b [m, k]."""
    return _in_float32(a, b, None)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _in_float32(input, self.weight, self.bias)


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _by_onednn(x, weight, bias):
        found: Tensor = _onednn()(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


def _in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16)).to(x.dtype)
    return found if bias is None else found.add_(bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [x, weight] if bias is None else [x, weight, bias]
    return (
        x.device.type == "cpu"
        and x.numel() * len(weight) >= _WORTH_IT
        and all(each.dtype == torch.float32 for each in given)
        and (bias is None or bias.is_contiguous())
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in given))
        and _onednn() is not None
    )


@cache
def _onednn() -> Any:
    """What inductor calls for linear layers; None where this torch is built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
