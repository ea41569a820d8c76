"""What matrix products of a forward are computed in: float32, or bfloat16, for which many processors have faster units.

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


def linear(compute: str) -> Linear:
    return _in_bfloat16 if compute == "bfloat16" else F.linear


def _in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16)).to(x.dtype)
    return found if bias is None else found.add_(bias)
