"""Matrices as onnxruntime's own operators have them, which onnxruntime-genai and transformers.js run: MatMulNBits and
GatherBlockQuantized, and for offsets a product with the sums of a group's inputs.

    x (scale · (code − zero) + offset)ᵀ = MatMulNBits(x) + (Σ over each group of x) offsetᵀ
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from qronos_export.artifact.onnx_blocks import Container, Parts
from qronos_export.artifact.onnx_data import DataFile
from qronos_export.artifact.onnx_graph import Piece, Style

MICROSOFT = "com.microsoft"


@final
class GenAI(Style):
    """`accuracy_level` is MatMulNBits': 0 computes in float, 4 rounds inputs to int8 in blocks, as llama.cpp does."""

    def __init__(self, data: DataFile, accuracy_level: int) -> None:
        super().__init__(data)
        self._accuracy_level = accuracy_level

    def scaled_product(self, name: str, x: str, y: str, piece: Piece, container: Container) -> None:
        inputs = [x, *self._numbers(name, piece, container, flat=False)]
        shape = {"K": piece.columns, "N": piece.rows, "bits": container.bits, "block_size": container.block}
        self.add("MatMulNBits", inputs, y, MICROSOFT, **shape, accuracy_level=self._accuracy_level)

    def scaled_lookup(self, name: str, ids: str, y: str, piece: Piece, container: Container) -> None:
        codes, *others = self._numbers(name, piece, container, flat=True)
        layout = {"bits": container.bits, "block_size": container.block, "gather_axis": 0, "quantize_axis": 1}
        self.add("GatherBlockQuantized", [codes, ids, *others], y, MICROSOFT, **layout)

    def scaled_copies(self, piece: Piece, container: Container) -> Iterator[Tensor]:
        rows = piece.rows
        if (codes := self.read((piece.key, "codes"))) is None:
            return
        scales, zeros = self.require((piece.key, "scales")), self.read((piece.key, "zeros"))
        zeros = None if zeros is None else zeros.view(rows, -1)
        looked_up, multiplied = self.read((piece.key, "offsets")), self.read((piece.key, "offsets transposed"))
        offsets = [] if looked_up is None else [looked_up.view(rows, -1)]
        offsets += [] if multiplied is None else [multiplied.view(-1, rows).T]
        for each in offsets if container.offset else [None]:
            yield container.values(Parts(codes.view(rows, -1), scales.view(rows, -1), zeros, each))

    def _numbers(self, name: str, piece: Piece, container: Container, flat: bool) -> list[str]:
        """Codes, scales and, unless codes are centred, zero points: the operators' inputs, in their order."""
        rows, blocks = piece.rows, piece.columns // container.block
        row_bytes = piece.columns * container.bits // 8
        shape = (rows, row_bytes) if flat else (rows, blocks, row_bytes // blocks)
        kind = "rows" if flat else f"Q{container.bits}"
        inputs = [
            self.put(f"{name}_{kind}", (piece.key, "codes"), lambda: self.parts(piece).codes, shape),
            self.put(f"{name}_scales", (piece.key, "scales"), lambda: self.parts(piece).scales, (rows, blocks)),
        ]
        if not container.centred:
            shape = rows, -(-blocks * container.bits // 8)
            inputs.append(self.put(f"{name}_zeros", (piece.key, "zeros"), lambda: self.parts(piece).zeros, shape))
        return inputs
