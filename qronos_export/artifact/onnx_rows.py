"""Which rows of which tensor of a GGUF file each matrix of an ONNX graph is made of, found by content.

A builder concatenates q, k and v, splits gate from up, and has rows of q and k in another order than llama.cpp. A row
is a row, though: `RowIndex` finds it by its hash, and equality decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qronos_export.artifact.gguf import GGUFFile, RowIndex
from qronos_export.errors import ArtifactError


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a matrix: they are `rows`, int64 [n], of tensor `tensor`."""

    tensor: str
    rows: Tensor

    @property
    def key(self) -> tuple[str, bytes]:
        return self.tensor, self.rows.numpy().tobytes()


def find_rows(file: GGUFFile, matrices: Mapping[str, Tensor]) -> dict[str, list[Rows]]:
    """What each of `matrices` (name -> float32 [rows, columns]) is made of, from its first row to its last.

    Raises ArtifactError for a matrix that holds other rows than the file, and for a quantized tensor in none of them.
    """
    names = [name for name, tensor in file.tensors.items() if len(tensor.shape) > 1]
    found: dict[str, list[Rows]] = {}
    missing = dict(matrices)
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
