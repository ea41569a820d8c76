"""The processes of a run beside the first: they search and calibrate with it, and write nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.calibration import Clock
from qronos_export.checkpoint import Checkpoint, LazyModel
from qronos_export.errors import OutputError
from qronos_export.folding import Folding, help_fold
from qronos_export.memory import ran_out
from qronos_export.plan import Mix, Plan
from qronos_export.ranks import Ranks
from qronos_export.recipe import Recipe
from qronos_export.shortage import Where, named
from qronos_export.streams import calibrate


@dataclass(frozen=True)
class Work:
    """What calibration needs to know: int64 `tokens` [samples, length], all before it, and a `folder` for files; where
    every process finds them."""

    recipe: Recipe
    checkpoint: Checkpoint
    source: Path
    mixes: list[Mix]
    tokens: torch.Tensor
    folder: Path


@dataclass(frozen=True)
class Nowhere:
    """What takes the blocks of a stream where another process writes them."""

    mix: Mix

    @property
    def store(self) -> Nowhere:
        return self

    def put(self, *blocks: object) -> None:
        pass


def follow(ranks: Ranks) -> None:
    """The part in `run` of every process but the first. Raises QronosError."""
    work: Work | Folding = ranks.receive()
    device = ranks.device(work.recipe.device)
    if isinstance(work, Folding):
        with named(Where(work.recipe, stage="transforms")):
            help_fold(work, device, ranks)
        work = ranks.receive()
        assert isinstance(work, Work)
    with named(Where(work.recipe, stage="layers")):
        try:
            _calibrate(work, device, ranks)
        except OSError as error:
            if ran_out(error):
                raise
            raise OutputError(f"Process {ranks.rank} could not read or write a file: {error}.") from error


def _calibrate(work: Work, device: torch.device, ranks: Ranks) -> None:
    source = GGUFFile(work.source)
    plan = Plan(source, RowIndex(source, list(dict.fromkeys(name for mix in work.mixes for name in mix.quantized))))
    outputs = [Nowhere(mix) for mix in work.mixes]
    model = LazyModel(work.checkpoint, device)
    tokens = work.tokens.to(device)
    for _ in calibrate(model, plan, outputs, tokens, work.recipe, Clock(), ranks=ranks, folder=work.folder):
        pass
