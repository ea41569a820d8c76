"""GGUF files opened: metadata, tensors and where their bytes are. gguf_write.py writes them.

The float file of upstream's converter is the oracle for names, metadata, tokenizer and the order of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from formats import FORMATS
from qronos_export.errors import ArtifactError

CHUNK = 1 << 22  # weights hashed or read at a time

TYPES: dict[int, tuple[str, int, int]] = {  # ggml's number -> name, weights a block, bytes a block
    **{int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()},
    **{
        fmt.ggml_type: (fmt.name, fmt.block_size, fmt.block_bytes)
        for fmt in FORMATS.values()
        if fmt.ggml_type is not None
    },
}
"""Every type a file may hold: upstream's package knows some, we know others."""

SCALED_ARCHITECTURES = frozenset({"llama", "qwen3", "qwen3moe"})
"""Where llama.cpp's graph multiplies with the `.scale` beside a tensor of a block. It loads such scales for every
architecture, but most graphs ignore those of the feed-forward part (b11549, src/models); these are tested."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file: where its bytes are and how its rows look."""

    name: str
    type: str  # ggml's name: "F32", "Q4_0", …
    shape: tuple[int, ...]  # numpy order, last is the row length
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1

    @property
    def experts(self) -> int:
        """Matrices stacked in the tensor."""
        return self.shape[0] if len(self.shape) > 2 else 1

    def expert(self, rows: Tensor) -> Tensor:
        """Which of the stacked matrices each of `rows` lies in."""
        return rows // (self.rows // self.experts)


@dataclass(frozen=True)
class Target:
    """Where rows of one of our weights go: row `file_rows[i]` of GGUF tensor `tensor` is row `rows[i]` of `source`."""

    tensor: str
    source: str
    rows: Tensor  # int64
    file_rows: Tensor  # int64


class _Reader(gguf.GGUFReader):
    """Upstream's reader, without a memory map's slice for every string of a vocabulary, which takes 3 times as long,
    and with types that upstream's package does not list yet."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        order = override_order or self.byte_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        self.stored: dict[str, StoredTensor] = {}
        for field in fields:
            _, name_data, _, dims, (kind,), (offset,) = field.parts
            name = bytes(name_data).decode("utf-8")
            if name in self.stored:
                raise ValueError(f"there are two tensors {name}")
            if int(kind) not in TYPES:
                raise ValueError(f"{name} has the unknown type {kind}")
            type_name, block_size, block_bytes = TYPES[int(kind)]
            shape = tuple(int(n) for n in reversed(dims))
            nbytes = int(np.prod(shape, dtype=np.int64)) // block_size * block_bytes
            self.stored[name] = StoredTensor(name, type_name, shape, start_offs + int(offset), nbytes)
            if self.stored[name].offset + nbytes > len(self.data):
                raise ValueError(f"it ends inside tensor {name}: it is truncated")


class GGUFFile:
    """A GGUF file opened for its metadata; tensor data is read on demand and never stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = _Reader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ArtifactError(f"{path} is not a readable GGUF file ({error}).") from error
        self.tensors = self.reader.stored

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it; empty where the file says none."""
        field = self.reader.fields.get(gguf.Keys.General.ARCHITECTURE)
        return "" if field is None else str(field.contents())

    def stated(self, key: str) -> Any:
        """What the file's metadata says under `key`; None where it says nothing."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors divided by their weights."""
        tensors = self.tensors.values()
        return 8 * sum(t.nbytes for t in tensors) / sum(t.rows * t.columns for t in tensors)

    def may_have_scale(self, tensor: StoredTensor) -> bool:
        """Whether llama.cpp multiplies what `tensor` computes with a `.scale` beside it."""
        return (
            self.architecture in SCALED_ARCHITECTURES
            and tensor.name.startswith("blk.")
            and f"{tensor.name.removesuffix('.weight')}.bias" not in self.tensors  # refused by llama.cpp's graph
        )

    def bytes(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Raw bytes of `rows` rows from row `first`: uint8 [rows, row_bytes]."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // tensor.rows
        count = tensor.rows - first if rows is None else rows
        with self.path.open("rb") as file:
            file.seek(tensor.offset + first * row_bytes)
            data = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
        if data.size != count * row_bytes:
            raise ArtifactError(f"{self.path} ends inside tensor {name}: the file is truncated.")
        return data.reshape(count, row_bytes)

    def floats(self, name: str) -> Iterator[Tensor]:
        """A float tensor's rows in order, some at a time: float32 [rows, columns]."""
        tensor = self.tensors[name]
        fmt = FORMATS[tensor.type]
        step = max(1, CHUNK // tensor.columns)
        for first in range(0, tensor.rows, step):
            yield fmt.dequantize(torch.from_numpy(self.bytes(name, first, min(step, tensor.rows - first))))


def extend(path: Path, most: int) -> GGUFFile:
    """The file `path`, which ends somewhere behind its header, with a hole for the weights that it lacks.

    most: bytes that its weights may take. Raises ArtifactError where its header is not whole.
    """
    size = path.stat().st_size
    os.truncate(path, size + most)
    end = max(tensor.offset + tensor.nbytes for tensor in GGUFFile(path).tensors.values())
    os.truncate(path, end)
    return GGUFFile(path)


def names_of(file: GGUFFile, weights: Iterable[str]) -> dict[str, str]:
    """Weights of a model, by their names in transformers -> the tensor of `file` that upstream's list of names has for
    them; without those it does not list. For forecasts: what is written goes by content."""
    architecture = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if architecture is None:
        return {}
    blocks = max((int(name.split(".")[1]) + 1 for name in file.tensors if name.startswith("blk.")), default=0)
    known = gguf.get_tensor_name_map(architecture, blocks)
    found = {weight: known.get_name(weight, try_suffixes=(".weight",)) for weight in weights}
    return {weight: name for weight, name in found.items() if name in file.tensors}
