"""What ggml rounds to while a model runs: its plain rules, one look at each block and no search.

    f16, bf16        the nearest of these, halves to even
    q8_0             d = max|x| / 127,              q = round(x/d), halves away from zero
    q4_0, q5_0       d = x_max / −8 or −16, x_max the number of largest size;   q = ⌊x/d + 8½⌋ or ⌊x/d + 16½⌋
    q4_1, q5_1       m = min, d = (max − min) / 15 or 31,      q = ⌊(x − m)/d + ½⌋
    iq4_nl           levels nearest to x / (x_max / −127); then d by least squares, each weight counting x²
    q8_k             d = x_max / −127,              q = round(x/d), at most 127; blocks of 256, d stays float32

The others' blocks are of 32; d and m are rounded to fp16 after the codes are chosen. A cache of keys and values holds
all but bf16 and q8_k; inputs of matrices are rounded to f16, bf16, q8_0 (q8_1 has its codes) and q8_k. Kernels for AVX
and NEON round halves to even in q8_0, which differs where x/d is exactly a half.

Source: ggml/src/ggml-quants.c of llama.cpp b11549, quantize_row_*_ref. Values are bit for bit what it dequantizes to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formats.ggml_codebook import IQ4_NL

Rounding = Callable[[Tensor], Tensor]
"""float [..., features] to the like, along the last dimension."""

_TOO_SMALL = 1e-15  # ggml's GROUP_MAX_EPS


def f16(x: Tensor) -> Tensor:
    return _half(x)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def q8_0(x: Tensor) -> Tensor:
    blocks = _blocks(x, 32)
    d = torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True)) / 127
    rest = blocks * _inverse(d)
    size = rest.abs()
    codes = size.floor()
    codes += size.sub_(codes).mul_(2).floor_()  # halves away from zero; all of it is exact, and in place for speed
    return codes.copysign_(rest).mul_(_half(d)).flatten(-2)


def q8_k(x: Tensor) -> Tensor:
    blocks = _blocks(x, 256)
    inverse = _inverse(_largest(blocks), over=-127.0)
    codes = (blocks * inverse).round().clamp(max=127)
    return (codes * _inverse(inverse)).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    return _signed(x, 8)


def q5_0(x: Tensor) -> Tensor:
    return _signed(x, 16)


def q4_1(x: Tensor) -> Tensor:
    return _affine(x, 15)


def q5_1(x: Tensor) -> Tensor:
    return _affine(x, 31)


def iq4_nl(x: Tensor) -> Tensor:
    blocks = _blocks(x, 32)
    levels = torch.tensor(IQ4_NL.levels.levels, device=x.device)
    largest = _largest(blocks)
    scaled = blocks * _inverse(largest / levels[0])
    nearest = levels[torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2, right=True)]
    weighted = blocks * blocks * nearest
    up = down = torch.zeros_like(largest)
    for column in range(32):  # in ggml's order, so that d is rounded as it is there
        one = slice(column, column + 1)
        up = up + weighted[..., one] * blocks[..., one]
        down = down + weighted[..., one] * nearest[..., one]
    d = torch.where((down > 0) & (largest.abs() >= _TOO_SMALL), up / down, 0.0)
    return (nearest * _half(d)).flatten(-2)


def _signed(x: Tensor, levels: int) -> Tensor:
    blocks = _blocks(x, 32)
    d = _largest(blocks) / -levels
    codes = (blocks * _inverse(d) + (levels + 0.5)).trunc().clamp(max=2 * levels - 1)
    return ((codes - levels) * _half(d)).flatten(-2)


def _affine(x: Tensor, levels: int) -> Tensor:
    blocks = _blocks(x, 32)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    d = (high - low) / levels
    codes = ((blocks - low) * _inverse(d) + 0.5).trunc().clamp(max=levels)
    return (codes * _half(d) + _half(low)).flatten(-2)


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.to(torch.float32).unflatten(-1, (-1, size))


def _largest(blocks: Tensor) -> Tensor:
    """The first number of largest size, with its sign."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _inverse(d: Tensor, over: float = 1.0) -> Tensor:
    """over / d, and zero where that is beyond every float."""
    inverse = torch.full_like(d, over) / d  # a number over a tensor would be rounded twice
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)


CACHE: dict[str, Rounding] = {
    "f16": f16, "q8_0": q8_0, "q5_1": q5_1, "q5_0": q5_0, "q4_1": q4_1, "q4_0": q4_0, "iq4_nl": iq4_nl,
}  # fmt: skip
"""What llama.cpp's cache of keys and values can be told to hold, but for wider floats."""
