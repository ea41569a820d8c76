"""QuaRot's rotations that fold into the weights (arXiv 2404.00456): R1 on the residual stream, R2 on every value head.

A norm without a gain commutes with a rotation, RMS(xR) = RMS(x); so gains move into the matrices that read the norm,
and what reads the stream is rotated against what writes to it. The head reads the last norm with its gain folded and
the embedding has none, so a tied pair becomes two tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qronos_export.errors import TransformError
from qronos_export.transforms.anatomy import Anatomy, Linear, Norm
from qronos_export.transforms.hadamard import random_rotation
from qronos_export.transforms.transform import Inputs, Outside, Transform


class Hadamard(Transform):
    """Random Hadamard R1 and R2 where the sizes have one, random orthogonal elsewhere."""

    unties = True

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rotation: torch.Tensor | None = None

    def outside(self, outside: Outside) -> None:
        self._rotation = self._draw(outside.embedding.weight.shape[1]).to(outside.embedding.weight.device)
        rotate_outside(outside, self._rotation)

    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        assert self._rotation is not None
        fold_gains(anatomy)
        rotate_block(anatomy, self._rotation, self._draw)

    def _draw(self, size: int) -> torch.Tensor:
        return random_rotation(size, self._generator)


class HadamardValues(Transform):
    """R2 alone: what is tied stays tied."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        rotate_values(anatomy, lambda size: random_rotation(size, self._generator))


def rotate_outside(outside: Outside, stream: torch.Tensor) -> None:
    """R1, `stream` [hidden, hidden], on what surrounds the blocks; the final norm's gain moves into the head."""
    embedding = Linear("embedding", outside.embedding.weight.detach())
    head = Linear("head", outside.head.weight.detach())
    norm = Norm("final norm", outside.norm, (head,))
    _check(norm)
    embedding.map_inputs(stream)
    norm.fold()
    head.map_inputs(stream)


def fold_gains(anatomy: Anatomy) -> None:
    """Move the gains of a block's norms into their readers. Raises TransformError where no rotation can pass."""
    if anatomy.loose:
        raise TransformError(
            f"{anatomy.loose[0]} puts a gain on what it adds to the residual stream, which a rotation cannot pass"
        )
    for norm in anatomy.norms:
        _check(norm)
        norm.fold()


def rotate_block(anatomy: Anatomy, stream: torch.Tensor, values: Callable[[int], torch.Tensor]) -> None:
    """R1, `stream` [hidden, hidden], on a block whose gains are folded, then R2, `values(head)` [head, head] for each
    attention in turn."""
    for norm in anatomy.norms:
        for reader in norm.readers:
            reader.map_inputs(stream)
    for writer in anatomy.writers:
        writer.map_outputs(stream)
    rotate_values(anatomy, values)


def rotate_values(anatomy: Anatomy, values: Callable[[int], torch.Tensor]) -> None:
    """R2: a rotation of its own for the value heads of every attention."""
    for pair in anatomy.pairs:
        if pair.kind == "value":
            rotate_heads(pair.first, pair.second, pair.head, values(pair.head).to(pair.first.weight.device))


def rotate_heads(value: Linear, out: Linear, head: int, rotation: torch.Tensor) -> None:
    """R2: one rotation for every head of `value`, undone by the columns of `out`."""
    for start in range(0, len(value.weight), head):
        value.rows(start, start + head).map_outputs(rotation)
    for start in range(0, out.weight.shape[1], head):
        Linear(out.name, out.weight[:, start : start + head]).map_inputs(rotation)


def _check(norm: Norm) -> None:
    if not norm.is_rms:
        raise TransformError(f"{norm.name} is no plain RMS norm ({type(norm.module).__name__}); it cannot be rotated")
