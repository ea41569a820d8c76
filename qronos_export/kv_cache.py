"""What becomes of keys and values in a cache, so that the quantized stream can attend to the same.

    f16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl   as llama.cpp keeps them, in blocks of 32 along a head
    int8 int4                             a scale and a zero point for each token and head: no runtime of ours has them

Where all heads are of one size and 64 divides it, llama.cpp rotates what it rounds to fewer than 16 bits: keys by the
largest Hadamard matrix of a power of two that divides a head, values by blocks of 64. It rotates queries and outputs
along, which comes to the same as rotating back what was rounded, and that is done here. R3 of QuaRot (arXiv 2404.00456)
is such a rotation for keys that llama.cpp does not turn. The rounding of queries in llama.cpp's kernels is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.ggml_reference import CACHE
from qronos_export.activations import per_token
from qronos_export.errors import UsageError
from qronos_export.transforms.hadamard import hadamard, random_rotation

Rounding = Callable[[Tensor], Tensor]
"""float [..., head size] to the like."""

_INTEGERS = {"int8": 8, "int4": 4}
_SMALLEST_ROTATION = 64


@dataclass(frozen=True)
class KVCache:
    """The types of keys and values, of heads of `sizes`; `r3` rotates the keys before they are rounded.

    Raises UsageError for sizes that a type's blocks do not divide, and for an r3 that llama.cpp's rotation would undo.
    """

    k: str
    v: str
    sizes: frozenset[int]
    r3: bool = False

    def __post_init__(self) -> None:
        for which, kind in (("k", self.k), ("v", self.v)):
            odd = sorted(size for size in self.sizes if size % 32)
            if odd and kind in CACHE and kind != "f16":
                raise UsageError(
                    f"kv_cache: {{{which}: {kind}}} has blocks of 32, which do not divide heads of {odd[0]} numbers; "
                    f"use {which}: f16."
                )
        if self.r3 and self.rotated(self.k):
            raise UsageError(
                f"online: r3 does not fit kv_cache: {{k: {self.k}}} and heads of {max(self.sizes)}: llama.cpp's cache "
                "rotates these keys by itself, and a second rotation would undo the first. Leave r3 out."
            )

    def rotated(self, kind: str) -> bool:
        """Whether llama.cpp rotates what it keeps in `kind`."""
        return kind in CACHE and kind != "f16" and len(self.sizes) == 1 and max(self.sizes) % _SMALLEST_ROTATION == 0

    def keys(self, order: Tensor | None = None) -> Rounding:
        """Rounds keys after RoPE; `order` [head size] are the numbers of a head as the file has them, where it has them
        in another order than the model."""
        rounding = _rounding(self.k)
        if self.rotated(self.k):
            size = max(self.sizes)
            rounding = _turned(rounding, _sylvester(size & -size))
        elif self.r3:
            rounding = _turned_at_random(rounding)
        return rounding if order is None else _ordered(rounding, order)

    def values(self) -> Rounding:
        """Rounds values, float [..., head size]; the model and the file have them in one order."""
        rounding = _rounding(self.v)
        return _turned(rounding, _sylvester(_SMALLEST_ROTATION)) if self.rotated(self.v) else rounding


def _rounding(kind: str) -> Rounding:
    return CACHE[kind] if kind in CACHE else lambda x: per_token(x, _INTEGERS[kind])


def _sylvester(size: int) -> Tensor:
    matrix = hadamard(size)
    assert matrix is not None
    return (matrix / size**0.5).to(torch.float32)


def _turned(rounding: Rounding, rotation: Tensor) -> Rounding:
    """`rounding` of each run of len(rotation) neighbours after `rotation`, and back."""

    def turned(x: Tensor) -> Tensor:
        matrix = rotation.to(x.device)
        there = (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
        return (rounding(there).unflatten(-1, (-1, len(matrix))) @ matrix.T).flatten(-2)

    return turned


def _turned_at_random(rounding: Rounding) -> Rounding:
    """`_turned` by one random rotation for each head size."""
    turned: dict[int, Rounding] = {}

    def rounded(x: Tensor) -> Tensor:
        size = x.shape[-1]
        if size not in turned:
            rotation = random_rotation(size, torch.Generator().manual_seed(0))
            turned[size] = _turned(rounding, rotation.to(torch.float32))
        return turned[size](x)

    return rounded


def _ordered(rounding: Rounding, order: Tensor) -> Rounding:
    back = order.argsort()
    return lambda x: rounding(x[..., order.to(x.device)])[..., back.to(x.device)]
