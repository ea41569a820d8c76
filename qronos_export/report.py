"""What a run did, as one JSON document with stable, versioned keys."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formats.compiled import how
from qronos_export.errors import ReportError
from qronos_export.typed_json import load, typed

SCHEMA = 1


@dataclass(frozen=True)
class LayerReport:
    """One tensor of an artifact.

    artifact:             the artifact's format, as asked for.
    error:                squared output error of the rounding against its target, relative to the layer's squared
                          output on calibration tokens; for methods without calibration, of the weights themselves.
    recoverable_mismatch: squared output error from the streams' mismatch that weights can undo, same unit.
    damping:              the λ used, in units of H.
    shrinkage, ridge:     the β used, by methods that correct for the mismatch, and qronos' ρ / mean(diag H).
    residual:             whether it also makes up for what the residual stream was off by, which is then part of the
                          recoverable mismatch.
    """

    artifact: str
    name: str
    tensor: str
    format: str
    method: str
    error: float | None
    recoverable_mismatch: float | None
    damping: float | None
    shrinkage: float | None
    ridge: float | None
    tokens: int
    seconds: float
    note: str = ""
    residual: bool = False


@dataclass
class Artifact:
    """One file of the run, or a folder with an ONNX model and the sha256 of its data. `validation` is None where it was
    not asked for."""

    path: str
    format: str
    bytes: int
    bits_per_weight: float
    sha256: str
    validation: dict[str, Any] | None = None


@dataclass
class RunReport:
    """Filled by the pipeline; `write` puts it beside the artifacts.

    kept:         tensors that stay float though their type was planned: {artifact, tensor, type, why}.
    substitutes:  tensors whose rows the planned type does not divide: {artifact, tensor, wanted, type}.
    notes:        what the run left out that the recipe's `auto` would have done, and why.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    calibration: dict[str, Any] | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)
    substitutes: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    schema: int = SCHEMA

    @property
    def validation(self) -> dict[str, Any] | None:
        """Of the first artifact; of most runs the only one."""
        return self.artifacts[0].validation if self.artifacts else None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {"schema": data.pop("schema"), **data, "validation": self.validation}

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)


def read_report(path: Path) -> RunReport:
    """What `write` wrote. Raises ReportError for a file that is no report, is damaged, or has another schema."""
    data = load(path)
    if not isinstance(data, dict) or "schema" not in data:
        raise ReportError(f"{path} is not the report of a run; expected what `qronos-export quantize` writes.")
    if data["schema"] != SCHEMA:
        raise ReportError(f"{path} has schema {data['schema']!r:.60}; this version reads {SCHEMA}. Update it.")
    return typed(RunReport, data, str(path))


def versions(llama_cpp: str) -> dict[str, str]:
    """Of everything that touched the bytes."""
    packages = ("qronos-export", "torch", "transformers", "safetensors", "gguf", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "llama_cpp": llama_cpp,
        "scale_search": how(),
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
