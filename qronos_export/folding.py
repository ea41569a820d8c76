"""The recipe's transforms, folded into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qronos_export.checkpoint import Checkpoint, LazyModel
from qronos_export.errors import TransformError
from qronos_export.ranks import ALONE, Ranks
from qronos_export.recipe import Recipe
from qronos_export.transformed import assist, transformed


@dataclass(frozen=True)
class Folded:
    """A checkpoint after `transforms`; `notes` says which of them were left out, and why."""

    checkpoint: Checkpoint
    transforms: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Folding:
    """What the other processes of a run need to know of `fold`: int64 `tokens` [samples, length] on the CPU."""

    recipe: Recipe
    checkpoint: Checkpoint
    tokens: torch.Tensor


def fold(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokens: torch.Tensor,
    folder: Path,
    *,
    kind: Callable[[Checkpoint, torch.device], LazyModel] = LazyModel,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Folded:
    """Apply the recipe's transforms, writing below `folder`. What the recipe names has to fit, what `auto` stands for
    may be left out.

    tokens: int64 [samples, length], on the device to compute on. `kind` is how the result will run; `ranks`, of
    which this is the first, `assist`.
    """
    names = recipe.transform_names
    if not names:
        return Folded(checkpoint, [], [])
    ranks.send(Folding(recipe, checkpoint, tokens.cpu()))
    try:
        done = transformed(
            checkpoint,
            names,
            tokens=tokens,
            formats=recipe.formats,
            seed=recipe.seed,
            micro_batch=recipe.micro_batch,
            folder=folder / "transformed",
            activations=recipe.activations,
            spin_steps=recipe.spin_steps,
            kind=kind,
            on_progress=on_progress,
            ranks=ranks,
            compute_dtype=recipe.compute_dtype,
        )
    except TransformError as error:
        if recipe.transforms != "auto":
            raise
        return Folded(checkpoint, [], [str(error)])
    return Folded(done, names, [])


def help_fold(work: Folding, device: torch.device, ranks: Ranks) -> None:
    """The part in `fold` of every process but the first."""
    recipe = work.recipe
    assist(
        work.checkpoint, recipe.transform_names, tokens=work.tokens.to(device), formats=recipe.formats,
        micro_batch=recipe.micro_batch, activations=recipe.activations,
        compute_dtype=recipe.compute_dtype, ranks=ranks,
    )  # fmt: skip
