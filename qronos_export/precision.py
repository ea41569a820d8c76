"""What matrix products of a forward are computed in: float32, or bfloat16 where the processor has units for it.

Hidden states, norms and attention stay as they are, and so do statistics; of a linear layer inputs, weights and what
comes out are rounded to eight bits of precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""F.linear of inputs [..., in], a weight [out, in] and a bias [out] or None."""

_COARSE = 6.6  # bits a weight


def resolved(asked: str, device: torch.device, bits: float) -> str:
    """`auto` is bfloat16 on a processor that has units for it, unless weights of so many `bits` are rounded so finely
    that bfloat16's own rounding would show."""
    if asked != "auto":
        return asked
    return "bfloat16" if bits <= _COARSE and _has_units(device) else "float32"


def linear(compute: str) -> Linear:
    return _in_bfloat16 if compute == "bfloat16" else F.linear


def _has_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16)).to(x.dtype)
    return found if bias is None else found.add_(bias)
