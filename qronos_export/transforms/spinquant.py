"""SpinQuant (arXiv 2405.16406): R1 and R2 of `hadamard`, learned.

Every step rotates a copy of each block, rounds it to the run's format and, where the run rounds activations, what its
layers read, and takes the cross entropy of the next tokens. The gradient, straight through both roundings, moves the
rotations along the orthogonal matrices: Cayley SGD (arXiv 2002.01113) at a rate that falls from 1.5 as a cosine.
Embedding and head are not rounded; hidden states are rotated instead, where they enter the blocks and leave them.

This is the one transform that holds the whole model, in float32, so its memory grows with depth. Gradients take room
for one block at a time: its rotated and rounded weights are made anew on the way back. With `compute_dtype` bfloat16
its matrix products are in that; rotations and the residual stream stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from formats import BlockFormat, Grid
from qronos_export.activations import activation
from qronos_export.errors import TransformError
from qronos_export.suspended import Block, is_experts
from qronos_export.transforms.anatomy import Anatomy
from qronos_export.transforms.hadamard import random_rotation
from qronos_export.transforms.rotation import fold_gains, rotate_block, rotate_outside
from qronos_export.transforms.scaling import search_format
from qronos_export.transforms.transform import Goal, Inputs, Outside, Transform, Whole

RATE = 1.5
TOKENS = 512  # a step
_REFIT = 10  # steps that a block keeps its scales for, since their search may take as long as the rest of a step


class SpinQuant(Transform):
    """Hadamard's R1 and R2 of the same seed, moved to where the rounded model predicts better."""

    unties = True
    learns = True

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._rotations: Iterator[Tensor] = iter(())
        self._stream: Tensor | None = None

    def learn(self, whole: Whole, on_progress: Callable[[int, int], None]) -> None:
        generator = torch.Generator().manual_seed(self._goal.seed)
        rounded = Rounded(whole, self._goal)
        try:
            rotations = rounded.draw(generator)
            self._rotations = iter(learned(rounded, rotations, self._goal.spin_steps, generator, on_progress))
        finally:
            rounded.close()

    def outside(self, outside: Outside) -> None:
        self._stream = next(self._rotations)
        rotate_outside(outside, self._stream)

    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        assert self._stream is not None
        fold_gains(anatomy)
        rotate_block(anatomy, self._stream, lambda size: next(self._rotations))


class Rounded:
    """A model whose blocks are rotated and rounded whenever they run. Takes `whole` over until it is closed."""

    def __init__(self, whole: Whole, goal: Goal) -> None:
        """Raises TransformError where the model cannot be rotated."""
        self.tokens = whole.tokens
        self._whole = whole
        self._format = goal.format
        self._activations = goal.activations
        self._bfloat16 = goal.compute_dtype == "bfloat16"
        for anatomy in whole.anatomies:
            fold_gains(anatomy)
        reads = None if goal.activations == "none" else _straight_through(self._read)
        self._blocks = [Block(module, lambda name: True, lambda part, stage: reads) for module in whole.blocks]
        self._grids: list[dict[str, tuple[float, Grid]]] = [{} for _ in whole.blocks]

    def close(self) -> None:
        for block in self._blocks:
            block.restore()

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Where learning begins: R1, then R2 of every attention, float64."""
        hidden, _ = self._whole.enter(self.tokens[:1, :1])
        heads = [size for anatomy in self._whole.anatomies for size in _heads(anatomy)]
        return [random_rotation(size, generator).to(hidden.device) for size in (hidden.shape[-1], *heads)]

    def forget_scales(self, blocks: slice) -> None:
        """Search scales anew the next time that these blocks run."""
        for grids in self._grids[blocks]:
            grids.clear()

    def loss(self, tokens: Tensor, rotations: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy of each next token of `tokens` int64 [sequences, length], in nats, for float32 `rotations`
        in the order of `draw`."""
        stream, values = rotations[0], iter(rotations[1:])
        hidden, arguments = self._whole.enter(tokens)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self._bfloat16):
            hidden = (hidden @ stream).float()
            for index, anatomy in enumerate(self._whole.anatomies):
                mine = [next(values) for _ in _heads(anatomy)]
                hidden = checkpoint(
                    self._run, index, hidden, arguments[index], stream, *mine,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            logits = self._whole.leave(tokens, (hidden @ stream.T).float())
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _run(self, index: int, hidden: Tensor, arguments: dict[str, Any], stream: Tensor, *values: Tensor) -> Tensor:
        module = self._whole.blocks[index]
        weights = {name: parameter.clone() for name, parameter in module.named_parameters()}
        copies = [(parameter, weights[name]) for name, parameter in module.named_parameters()]
        rotations = iter(values)
        rotate_block(self._whole.anatomies[index].over(copies), stream, lambda size: next(rotations))
        for name, transposed in _matrices(module):
            weight = weights[name].mT if transposed else weights[name]
            rounded = _straight_through(lambda w, name=name: self._round(index, name, w))(weight)  # type: ignore[misc]
            weights[name] = rounded.mT if transposed else rounded
        output = functional_call(module, weights, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _read(self, x: Tensor) -> Tensor:
        """Inputs [..., features] as the run rounds them for weights of that width."""
        rounding = activation(self._activations, search_format(self._format, x.shape[-1]))
        return rounding(x) if rounding else x

    def _round(self, index: int, name: str, weight: Tensor) -> Tensor:
        """Nearest stored values of [..., out, in]; as it is where blocks do not divide its rows."""
        rows = weight.flatten(0, -2)
        fmt = search_format(self._format, rows.shape[1])
        if rows.shape[1] % fmt.block_size:
            return weight
        if name not in self._grids[index]:
            self._grids[index][name] = _fit(fmt, rows)
        scale, grid = self._grids[index][name]
        return (grid.values(grid.nearest(rows / scale)) * scale).view(weight.shape)


def learned(
    rounded: Rounded,
    rotations: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
    on_progress: Callable[[int, int], None],
) -> list[Tensor]:
    """`rotations` float64 after `steps` steps on pieces of the calibration text, one at a time in an order drawn anew
    whenever all were seen. Raises TransformError when the loss is no number."""
    length = min(TOKENS, rounded.tokens.shape[1])
    pieces = rounded.tokens[:, : rounded.tokens.shape[1] // length * length].reshape(-1, 1, length)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(pieces), generator=generator).tolist()
        rounded.forget_scales(slice(step % _REFIT, None, _REFIT))
        leaves = [rotation.float().requires_grad_() for rotation in rotations]
        loss = rounded.loss(pieces[order.pop()], leaves)
        if not bool(torch.isfinite(loss)):
            raise TransformError(f"the rounded model's loss is {loss.item()} in step {step + 1} of {steps}")
        rate = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        gradients = torch.autograd.grad(loss, leaves)
        rotations = [cayley_step(r, g.double(), rate) for r, g in zip(rotations, gradients, strict=True)]
        on_progress(step + 1, steps)
    return [nearest_rotation(rotation) for rotation in rotations]


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """(I + α/2 Y)⁻¹ (I − α/2 Y) R for the skew Y = (G Rᵀ − R Gᵀ)/2: orthogonal, and downhill (arXiv 2002.01113,
    algorithm 1, without momentum). All float64 [n, n].

    α is `rate`, and 1/‖Y‖ at most.
    """
    along = gradient @ rotation.T
    skew = (along - along.T) / 2
    half = min(rate, 1 / (float(torch.linalg.matrix_norm(skew)) + 1e-8)) / 2 * skew
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + half, (eye - half) @ rotation)


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to `matrix` [n, n]: the polar factor."""
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def _heads(anatomy: Anatomy) -> list[int]:
    return [pair.head for pair in anatomy.pairs if pair.kind == "value"]


def _matrices(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Parameters below `module` that inputs are multiplied with, and whether they are [..., in, out]."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield f"{name}.weight", False
        elif is_experts(part):
            for leaf, parameter in part.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{name}.{leaf}", bool(part.is_transposed)


def _fit(fmt: BlockFormat, rows: Tensor) -> tuple[float, Grid]:
    """A scale for the whole matrix, and the format's searched scales below it."""
    scale = fmt.tensor_scale(rows)
    return scale, fmt.fit(rows / scale)


def _straight_through(rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`rounding` with the gradient of the identity."""

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            moved = rounding(x) - x
        return x + moved

    return forward
