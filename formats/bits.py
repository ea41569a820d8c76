"""Codes of a few bits ↔ bytes. Codes that share a byte are *planes*: plane p sits at bit p · bits of it."""

from __future__ import annotations

import torch
from torch import Tensor


def join(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., planes, lanes] → uint8 [..., lanes]: byte l holds code [p, l] at bit p · bits."""
    data = codes[..., 0, :]
    for plane in range(1, codes.shape[-2]):
        data = data | codes[..., plane, :] << plane * bits
    return data


def split(data: Tensor, bits: int, planes: int | None = None) -> Tensor:
    """uint8 [..., lanes] → uint8 [..., planes, lanes], the inverse of `join`; as many planes as a byte holds."""
    shifts = torch.arange(8 // bits if planes is None else planes, dtype=torch.uint8, device=data.device) * bits
    return data[..., None, :] >> shifts[:, None] & (1 << bits) - 1


def pack_nibbles(codes: Tensor, run: int) -> Tensor:
    """uint8 [..., n] → uint8 [..., n / 2]: of each `run` codes the first half goes into low nibbles, the rest above."""
    return join(codes.unflatten(-1, (-1, 2, run // 2)), 4).flatten(-2)


def unpack_nibbles(data: Tensor, run: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return split(data.unflatten(-1, (-1, run // 2)), 4).flatten(-3)


def pack_consecutive(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] → bytes [..., n · bits / 8]: neighbours share a byte, the first lowest (bits 1, 2 or 4)."""
    return join(codes.unflatten(-1, (-1, 8 // bits)).transpose(-1, -2), bits)


def unpack_consecutive(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_consecutive`."""
    return split(data, bits).transpose(-1, -2).flatten(-2)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] → bytes [..., n · bits / 8]: a little-endian stream in which codes may straddle bytes."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_consecutive((codes[..., None] >> places & 1).flatten(-2), 1)


def unpack_stream(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_stream`."""
    return join(unpack_consecutive(data, 1).unflatten(-1, (-1, bits)).transpose(-1, -2), 1)
