"""What a recipe leaves open, filled in with what the model says."""

from __future__ import annotations

from dataclasses import replace

import torch

from qronos_export import corpus
from qronos_export.checkpoint import Checkpoint
from qronos_export.recipe import Recipe


def replayable(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> Recipe:
    """The recipe with what it left open: the device, and the commit that a hub id stood for."""
    model = recipe.model if checkpoint.revision is None else f"{checkpoint.repository}@{checkpoint.revision}"
    return replace(recipe, model=model, device=str(device))


def matched(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the numbers that `match_lengths` stands for: sequences of that length, and samples for at least
    as many tokens. Raises CalibrationError for a file that holds no prompts."""
    if recipe.match_lengths is None:
        return recipe
    length = corpus.median_length(recipe.match_lengths, checkpoint)
    samples = -(-recipe.samples * recipe.sequence_length // length)
    return replace(recipe, samples=samples, sequence_length=length, match_lengths=None)
