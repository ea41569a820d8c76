"""What decides the bytes of a run: two runs of one identity write the same files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from qronos_export.checkpoint import Checkpoint
from qronos_export.recipe import Recipe
from qronos_export.report import sha256

SCHEMA = 1  # of the state that a run of this version leaves
_DESCRIBES = {".json", ".model", ".jinja", ".txt", ".md", ".py"}  # files beside weights that may show in the result


def identity(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device, versions: Mapping[str, str]
) -> dict[str, str]:
    """All that decides a run's bytes, name -> text; files by what they hold, wherever they lie. Reads the model."""
    settings = recipe.to_json()
    for name in ("model", "calibration", "match_lengths", "device", "offload"):
        settings.pop(name)
    text = Path(recipe.calibration).expanduser()
    model = {tensor.file for tensor in checkpoint.tensors.values()}
    model |= {file for file in checkpoint.folder.iterdir() if file.suffix in _DESCRIBES and file.name != "report.json"}
    if checkpoint.float_gguf is not None:
        model = {checkpoint.float_gguf}
    return {
        "schema": str(SCHEMA),
        "model": checkpoint.name,
        **{f"model/{file.name}": sha256(file) for file in sorted(model) if file.is_file()},
        "calibration text": sha256(text) if text.is_file() else recipe.calibration,
        **{f"recipe.{name}": json.dumps(value, ensure_ascii=False) for name, value in settings.items()},
        **{f"version of {name}": version for name, version in versions.items()},
        "code": code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """What of a CPU decides how torch adds up."""
    return f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"


def code() -> str:
    """Of this package's own sources, which may change without its version."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in ("formats", "qronos_export"):
        for file in sorted((root / folder).rglob("*.*")):
            if file.suffix in (".py", ".cpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
