"""What `pipeline.run` and its like tell of a run while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qronos_export.report import LayerReport, RunReport


@dataclass(frozen=True)
class Stage:
    """A phase of the run begins; `steps` of it will be announced, or None where that cannot be told."""

    name: str
    steps: int | None = None


@dataclass(frozen=True)
class Step:
    """`done` steps of the current stage are finished; `layer` is the last tensor rounded, if any."""

    done: int
    layer: LayerReport | None = None


@dataclass(frozen=True)
class Finished:
    report: RunReport
    folder: Path


@dataclass(frozen=True)
class Resumed:
    """A run before this one finished `done` steps: embedding, blocks, head. `damaged` names what has to be redone."""

    done: int
    damaged: list[str]


Event = Stage | Step | Resumed | Finished
