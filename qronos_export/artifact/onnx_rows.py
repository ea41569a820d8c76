"""Which rows of which tensor of a GGUF file each matrix of an ONNX graph is made of, found by content.

A builder concatenates q, k and v, splits gate from up, and has rows of q and k in another order than llama.cpp. A row
is a row, though: `RowIndex` finds it by its hash, and equality decides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.errors import ArtifactError


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a matrix: they are `rows`, int64 [n], of tensor `tensor`."""

    tensor: str
    rows: Tensor

    @property
    def key(self) -> tuple[str, str]:
        """Short enough for a message."""
        return self.tensor, hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()


def find_rows(file: GGUFFile, matrices: Mapping[str, Tensor]) -> dict[str, list[Rows]]:
    """What each of `matrices` (name -> float32 [rows, columns]) is made of, from its first row to its last.

    Of tensors with the same content (merges that repeat layers) the first layer's goes to the first layer. Raises
    ArtifactError for a matrix that holds other rows than the file, and for a quantized tensor in none of them.
    """
    names = sorted((name for name, tensor in file.tensors.items() if len(tensor.shape) > 1), key=_natural)
    found: dict[str, list[Rows]] = {}
    missing = {name: matrices[name] for name in sorted(matrices, key=_natural)}
    unused = set(names)
    while missing:
        index = RowIndex(file, names)
        starts: dict[str, list[tuple[int, Rows]]] = {}
        for target in index.match(missing):
            order = target.rows.argsort()
            rows, file_rows = target.rows[order], target.file_rows[order]
            cuts = ((rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1).tolist()
            for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                part = Rows(target.tensor, file_rows[first:last])
                starts.setdefault(target.source, []).append((int(rows[first]), part))
        unused &= set(index.unmatched)
        complete = {
            name: [part for _, part in sorted(parts, key=lambda each: each[0])]
            for name, parts in starts.items()
            if sum(len(part.rows) for _, part in parts) == len(matrices[name])
        }
        if not complete:
            name, matrix = next(iter(missing.items()))
            raise ArtifactError(
                f"{name} {list(matrix.shape)} of the ONNX graph is not made of rows of {file.path.name}; this model's "
                "graph and file differ in more than the order of rows. Use --artifact gguf."
            )
        found |= complete
        for name in complete:
            del missing[name]
    if unused:
        raise ArtifactError(
            f"{min(unused)} of {file.path.name} is no matrix of its own in the ONNX graph. Use --artifact gguf."
        )
    return found


def find_vectors(file: GGUFFile, vectors: Sequence[Tensor]) -> None:
    """Raises ArtifactError for a norm or bias of the file whose numbers are in none of `vectors`, a graph's.

    Frequencies of positions are left out: a graph holds their sines and cosines.
    """
    known = torch.cat(list(vectors)).unique() if vectors else torch.empty(0)
    for name, tensor in file.tensors.items():
        if len(tensor.shape) > 1 or name.startswith("rope_"):
            continue
        values = torch.cat(list(file.floats(name))).flatten()
        if bool(values.any()) and not bool(torch.isin(values, known).all()):
            raise ArtifactError(
                f"{name} of {file.path.name} is nowhere in the ONNX graph: its configuration has no such part. "
                "Use --artifact gguf, or convert --like the original model."
            )


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Layer 2 before layer 10."""
    return tuple((int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", name))
