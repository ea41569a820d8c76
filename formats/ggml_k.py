"""ggml's K types: super-blocks of 256 weights whose sub-blocks share quantized scales.

    Q6_K    128 × low nibbles | 64 × high pairs of bits | 16 × int8 sc | fp16 d;   w = d·sc·(q − 32), 0 ≤ q ≤ 63

    Q6_K's bits, for each half of 128 weights (ql: 64 bytes, qh: 32 bytes) and l in 0 … 31:
        w[l]      = ql[l] & 15      | (qh[l] >> 0 & 3) << 4
        w[l + 32] = ql[l + 32] & 15 | (qh[l] >> 2 & 3) << 4
        w[l + 64] = ql[l] >> 4      | (qh[l] >> 4 & 3) << 4
        w[l + 96] = ql[l + 32] >> 4 | (qh[l] >> 6 & 3) << 4

llama.cpp stores the output matrix of Q4_0 and most other files as Q6_K where 256 divides its rows.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from formats.block import BlockFormat, Grid, Integers, blocked, half_bytes, half_from_bytes, reciprocal
from formats.scale_search import grouped, search_scale, to_half, weighted_error


@final
class Q6_K(BlockFormat):
    """128 × low nibbles | 64 × high bits | 16 × int8 sc | fp16 d;  w = d·sc·(q − 32)."""

    name, ggml_type, block_size, block_bytes = "Q6_K", 14, 256, 128 + 64 + 16 + 2
    levels = Integers(-32, 31)
    reach = (-32.0, 32.0, -31.0, 31.0, -30.0, 30.0)
    ends = (-128.0, 127.0, -127.0, -126.0, -124.0, -122.0, -120.0)  # where the largest sub-scale may land

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        rows = weights.shape[0]
        groups, weighing = grouped(weights, importance, 16)
        wanted = search_scale(groups, weighing, self.levels, self.reach).view(-1, 16)
        peak = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
        best: tuple[Tensor, Tensor, Tensor] | None = None  # error, d, sc of each super-block
        for end in self.ends:
            d = to_half(peak / end)
            sc = (wanted * reciprocal(d)).round_().clamp_(-128, 127)
            error = weighted_error(groups, weighing, (d * sc).view(-1), self.levels).view(-1, 16).sum(1, keepdim=True)
            if best is None:
                best = error, d, sc
            else:
                better = error < best[0]
                best = (
                    torch.where(better, error, best[0]),
                    torch.where(better, d, best[1]),
                    torch.where(better, sc, best[2]),
                )
        assert best is not None
        return self._grid(best[1].view(rows, -1), best[2].view(rows, -1))

    def _grid(self, d: Tensor, sc: Tensor) -> Grid:
        return Grid(d.repeat_interleave(16, dim=1) * sc, self.levels, group=16, fields=(d, sc))

    def pack(self, codes: Tensor, grid: Grid) -> Tensor:
        d, sc = grid.fields
        q = (codes + 32).to(torch.uint8).view(codes.shape[0], -1, 2, 4, 32)  # half, quarter of the half, l
        low = torch.stack(
            [q[..., 0, :] & 15 | (q[..., 2, :] & 15) << 4, q[..., 1, :] & 15 | (q[..., 3, :] & 15) << 4], 3
        )
        high = q[..., 0, :] >> 4 | q[..., 1, :] >> 4 << 2 | q[..., 2, :] >> 4 << 4 | q[..., 3, :] >> 4 << 6
        parts = low.flatten(2), high.flatten(2), sc.to(torch.int8).view(torch.uint8).view(*d.shape, 16), half_bytes(d)
        return torch.cat(parts, dim=2).view(codes.shape[0], -1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Grid]:
        parts = blocked(blocks, self.block_bytes)
        rows, count = parts.shape[:2]
        low = parts[:, :, :128].view(rows, count, 2, 2, 32)
        high = parts[:, :, 128:192].reshape(rows, count, 2, 1, 32)
        q = torch.cat([low & 15, low >> 4], dim=3)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
        codes = (q | (high >> shifts & 3) << 4).to(torch.int8) - 32
        sc = parts[:, :, 192:208].contiguous().view(torch.int8).to(torch.float32)
        return codes.reshape(rows, -1), self._grid(half_from_bytes(parts[:, :, 208:]), sc.view(rows, -1))


FORMATS: tuple[BlockFormat, ...] = (Q6_K(),)
