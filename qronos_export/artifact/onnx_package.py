"""ONNX folders: the builder's graph, the tokenizer, and the very blocks of a GGUF run or file in place of the weights.

    GenAI             model.onnx, model.onnx.data, genai_config.json and the tokenizer, for onnxruntime-genai
    transformers.js   onnx/model_q4.onnx, onnx/model_q4.onnx_data, config.json and the tokenizer: the same graph
    plain, mx         model.onnx, model.onnx.data and the tokenizer: standard operators alone, for any runtime

Nothing is rounded here. What no integers of ONNX hold is kept as floats and named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from torch import Tensor

from formats import FORMATS, BlockFormat
from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import row_hashes
from qronos_export.artifact.onnx_blocks import MX_TYPES
from qronos_export.artifact.onnx_data import DataFile
from qronos_export.artifact.onnx_genai import GenAI
from qronos_export.artifact.onnx_graph import Opened, Piece, Style, rewritten
from qronos_export.artifact.onnx_plain import Plain
from qronos_export.artifact.onnx_rows import Rows, find_rows, find_vectors
from qronos_export.errors import ArtifactError

GENAI_CONFIG = "genai_config.json"


class Blocks(Protocol):
    """Blocks by the names of a GGUF file's tensors."""

    def format(self, tensor: str) -> BlockFormat: ...

    def blocks(self, tensor: str) -> np.ndarray:
        """uint8 [rows, row_bytes]."""
        ...

    def factor(self, tensor: str) -> float:
        """What the values of the tensor count."""
        ...


@dataclass(frozen=True)
class OfFile:
    """The blocks of a GGUF file."""

    file: GGUFFile

    def format(self, tensor: str) -> BlockFormat:
        return FORMATS[self.file.tensors[tensor].type]

    def blocks(self, tensor: str) -> np.ndarray:
        return self.file.bytes(tensor)

    def factor(self, tensor: str) -> float:
        return 1.0


@dataclass(frozen=True)
class OfRun:
    """What a run has rounded, and the float file's tensors that it has not."""

    source: GGUFFile
    store: BlockStore

    def format(self, tensor: str) -> BlockFormat:
        return self.store.formats.get(tensor) or FORMATS[self.source.tensors[tensor].type]

    def blocks(self, tensor: str) -> np.ndarray:
        if tensor not in self.store.formats:
            return self.source.bytes(tensor)
        blocks = self.store.blocks(tensor)
        values = self.store.formats[tensor].dequantize(torch.from_numpy(blocks))
        if not torch.equal(row_hashes(values), self.store.calibrated(tensor)):
            raise ArtifactError(f"{tensor} is not what was calibrated.")
        return blocks

    def factor(self, tensor: str) -> float:
        scales = self.store.scales.get(f"{tensor.removesuffix('.weight')}.scale")
        return 1.0 if scales is None else float(scales[0])


@dataclass
class Package:
    """A folder that was written, its model, the data beside it, and how the types are kept."""

    folder: Path
    model: Path
    data: Path
    notes: list[str] = field(default_factory=list)


def write_package(
    graph: Path, file: GGUFFile, blocks: Blocks, destination: Path, *, layout: str = "onnx", accuracy_level: int = 4
) -> Package:
    """Write the model whose float graph is `graph`, and whose rows are those of `file`, with `blocks` to `destination`,
    which must not exist. Raises ArtifactError where graph and file do not fit together."""
    opened = Opened(graph)
    config = json.loads((graph.parent / GENAI_CONFIG).read_text(encoding="utf-8"))
    head_size = int(config["model"]["decoder"]["head_size"])
    matrices = opened.matrices()
    found = find_rows(file, matrices)
    find_vectors(file, opened.vectors())
    pieces = {name: _pieces(parts, blocks, matrices[name].shape[1]) for name, parts in found.items()}
    model = destination / ("onnx/model_q4.onnx" if layout == "onnx-js" else "model.onnx")
    model.parent.mkdir(parents=True)
    with DataFile(model.with_name(f"{model.name}{'_data' if layout == 'onnx-js' else '.data'}")) as data:
        if layout in ("onnx-plain", "onnx-mx"):
            widths = {name: tensor.dims[-1] for name, tensor in opened.tensors.items()}
            style: Style = Plain(data, head_size, widths, mx=layout == "onnx-mx")
        else:
            style = GenAI(data, accuracy_level)
        made = rewritten(opened, pieces, style)
    _name_head_size(made, head_size)
    onnx.save(made, model)
    if layout in ("onnx-plain", "onnx-mx"):
        onnx.checker.check_model(model)
    for piece in chain.from_iterable(pieces.values()):
        style.verify(piece)
    copy_beside(graph.parent, destination, layout)
    return Package(destination, model, data.path, _notes(pieces, layout))


def _pieces(parts: Sequence[Rows], blocks: Blocks, columns: int) -> list[Piece]:
    """Runs of one format and factor."""

    def kind(part: Rows) -> tuple[str, float]:
        return blocks.format(part.tensor).name, blocks.factor(part.tensor)

    def piece(run: Sequence[Rows]) -> Piece:
        fmt, factor = blocks.format(run[0].tensor), blocks.factor(run[0].tensor)

        def read() -> Tensor:
            return torch.cat([torch.from_numpy(blocks.blocks(part.tensor))[part.rows] for part in run])

        return Piece(tuple(part.key for part in run), fmt, (sum(len(p.rows) for p in run), columns), read, factor)

    return [piece(list(run)) for _, run in groupby(parts, kind)]


def _name_head_size(model: onnx.ModelProto, head_size: int) -> None:
    """In the shapes of keys and values, which the builder leaves open."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size


def copy_beside(built: Path, destination: Path, layout: str) -> None:
    """The tokenizer, and for onnxruntime-genai its configuration."""
    for path in built.iterdir():
        if (
            path.is_file()
            and not path.name.startswith("model.onnx")
            and (layout == "onnx" or path.name != GENAI_CONFIG)
        ):
            shutil.copy(path, destination)
    if layout == "onnx-js":
        settings = {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
        _set(destination / "config.json", "transformers.js_config", settings)
        template = destination / "chat_template.jinja"
        if template.is_file():  # which its loader does not look for
            _set(destination / "tokenizer_config.json", "chat_template", template.read_text(encoding="utf-8"))


def _set(file: Path, key: str, value: object) -> None:
    """One more entry of a JSON file."""
    entries = json.loads(file.read_text(encoding="utf-8")) | {key: value}
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _notes(pieces: dict[str, list[Piece]], layout: str) -> list[str]:
    """How the types are kept; none of it changes a value."""
    notes = {}
    for name, parts in pieces.items():
        for piece in parts:
            fmt, held = piece.format, piece.container
            if layout == "onnx-mx" and fmt.name in MX_TYPES:
                notes[fmt.name] = f"{fmt} is kept in ONNX's own type, which onnxruntime does not run on CPUs yet"
            elif held is None and not fmt.is_float:
                notes[name] = f"{name} is kept as floats: no integers of ONNX hold {fmt}"
            elif held is not None:
                sums = f" and an offset for {held.group}" if held.offset else ""
                notes[fmt.name] = (
                    f"{fmt} is kept as {held.bits}-bit integers with a scale for {held.block} columns{sums}"
                )
    return list(notes.values())
