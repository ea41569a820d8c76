"""ONNX models of a run: whether they can be, the graph, the folder, and how good they are.

The packages of the extra `onnx` are imported inside functions; everything else works without them.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from formats import find_format
from qronos_export import report
from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.onnx_blocks import MX_TYPES, container
from qronos_export.artifact.onnx_builder import build_float, check_packages, set_windows
from qronos_export.checkpoint import Checkpoint, attention_windows
from qronos_export.errors import UsageError
from qronos_export.onnx_validation import check_graph
from qronos_export.recipe import Recipe
from qronos_export.report import Artifact

if TYPE_CHECKING:
    from qronos_export.artifact.onnx_package import Blocks


def onnx_versions() -> dict[str, str]:
    """Of the packages that an ONNX model is made with."""
    check_packages()
    return {name: version(name) for name in ("onnx", "onnxruntime", "onnxruntime-genai")}


def onnx_folder(gguf: Path, layout: str) -> Path:
    """Where the ONNX model that goes with a GGUF file lies."""
    return gguf.with_name(f"{gguf.stem}-{layout}")


def check_foreign(name: str, recipe: Recipe) -> None:
    """Raises UsageError unless a type that no GGUF file holds can be written as the recipe wants."""
    if "gguf" in recipe.artifacts:
        layout = "onnx" if container(find_format(name, 256)) else "onnx-mx" if name in MX_TYPES else None
        how = f"--artifact {layout}, or another type" if layout else "another type"
        raise UsageError(f"--format {name} is no type of GGUF; use {how}.")
    if container(find_format(name, 256)) is None and not (name in MX_TYPES and recipe.artifacts == ["onnx-mx"]):
        only = "only --artifact onnx-mx can" if name in MX_TYPES else "choose another type"
        raise UsageError(f"--format {name}: no integers of ONNX hold it exactly; {only}.")
    if recipe.activations == "llama.cpp":
        raise UsageError(f"activations: llama.cpp has no kernel for {name}, whose inputs it could round; use q8_0.")


def float_graph(checkpoint: Checkpoint, folder: Path) -> Path:
    """The builder's model.onnx of `checkpoint`, in `folder`, which says in onnxruntime what the model says in torch.

    Raises UsageError for models the builder does not know, ArtifactError for those it gets wrong.
    """
    graph = build_float(checkpoint.folder, _architecture(checkpoint), folder)
    set_windows(graph, attention_windows(checkpoint))
    check_graph(graph, checkpoint)
    for name in ("config.json", "generation_config.json"):
        if (checkpoint.folder / name).is_file():
            shutil.copy(checkpoint.folder / name, folder)
    return graph


def _architecture(checkpoint: Checkpoint) -> str:
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("architectures") or [config["model_type"]])[0]


def write_onnx(
    graph: Path, source: GGUFFile, blocks: BlockStore | None, folder: Path, *, format: str, layout: str, level: int
) -> tuple[Artifact, list[str]]:
    """Write the model with the float graph `graph` to `folder`, its blocks from a run's store, or without one from
    `source` itself. The report's line has bytes of the whole folder and sha256 of the data file; then notes."""
    from qronos_export.artifact.onnx_package import OfFile, OfRun, write_package

    taken: Blocks = OfFile(source) if blocks is None else OfRun(source, blocks)
    package = write_package(graph, source, taken, folder, layout=layout, accuracy_level=level)
    weights = sum(tensor.rows * tensor.columns for tensor in source.tensors.values())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bits = 8 * package.data.stat().st_size / weights
    return Artifact(folder.name, format, size, bits, report.sha256(package.data)), package.notes
