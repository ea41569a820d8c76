"""Channels of like size side by side: a block has one scale, so what lies in it should need the same one.

Inputs of `down` may come in any order if the rows of `up` and `gate` do; inputs of `o` within a head, if the rows of
`v` do, the same for all heads that read it. Nothing else changes, neither bytes nor speed. (RPTQ, arXiv 2304.01089,
orders channels by their activations' range, for scales of activations; this is the same for scales of weights.)
"""

from __future__ import annotations

import torch

from qronos_export.transforms.anatomy import Anatomy, Pair
from qronos_export.transforms.transform import Inputs, Transform


class Permute(Transform):
    """Sorts what lies between v and o, and between up and down, by the norm of the columns that read it."""

    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        for pair in anatomy.pairs:
            power = pair.second.weight.float().square().sum(0)[pair.copies].sum(1)
            size = len(power) if pair.kind == "inner" else pair.head
            within = power.view(-1, size).argsort(dim=1, stable=True)
            permute(pair, (within + torch.arange(0, len(power), size, device=power.device)[:, None]).flatten())


def permute(pair: Pair, order: torch.Tensor) -> None:
    """Put row order[i] of `pair.first` in row i, and so with the columns of `pair.second`. int64 [out of first]"""
    for linear in filter(None, (pair.first, pair.gate)):
        linear.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])
    columns = torch.empty(pair.second.weight.shape[1], dtype=torch.int64, device=order.device)
    columns[pair.copies] = pair.copies[order]
    pair.second.weight.copy_(pair.second.weight[:, columns])
