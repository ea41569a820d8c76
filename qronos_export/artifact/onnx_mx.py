"""Microscaling weights in ONNX's own types (opset 24): FLOAT4E2M1, FLOAT8E4M3FN, FLOAT8E5M2, scales in FLOAT8E8M0.

    MatMul(x, DequantizeLinear(elements [in, out], scales [in / 32, out], axis 0, block 32))

The standard defines them and onnx's reference evaluator computes with them; onnxruntime 1.31 has no CPU kernel for the
scales. `DequantizeLinear` gives 2^(e − 127) · element, which is what the format says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from onnx import TensorProto
from torch import Tensor

from formats.bits import pack_consecutive, unpack_consecutive
from qronos_export.artifact.onnx_blocks import MX_TYPES

if TYPE_CHECKING:
    from qronos_export.artifact.onnx_graph import Piece, Style

OPSET = 24
_ELEMENTS = dict(zip(MX_TYPES, (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2), strict=True))


def product(style: Style, name: str, x: str, y: str, piece: Piece) -> None:
    """`y` = `x` times the transposed piece."""
    fmt = piece.format
    four = fmt.name == "MXFP4"

    def elements() -> Tensor:
        codes = fmt.unpack(piece.blocks())[0].view(torch.uint8).T
        return pack_consecutive(codes.reshape(-1), 4) if four else codes

    inputs = [
        style.put(
            f"{name}_elements", (piece.key, "mx elements"), elements, (piece.columns, piece.rows), _ELEMENTS[fmt.name]
        ),
        style.put(
            f"{name}_exponents", (piece.key, "mx exponents"), lambda: fmt.unpack(piece.blocks())[1].fields[0].T,
            (piece.columns // 32, piece.rows), TensorProto.FLOAT8E8M0,
        ),
    ]  # fmt: skip
    weight = style.add("DequantizeLinear", inputs, f"{y}/weight", axis=0, block_size=32, output_dtype=TensorProto.FLOAT)
    style.add("MatMul", [x, weight], y)


def values(style: Style, piece: Piece) -> Iterator[Tensor]:
    """What the copy in the data file, if there is one, stands for."""
    elements, exponents = style.read((piece.key, "mx elements")), style.read((piece.key, "mx exponents"))
    if elements is None or exponents is None:
        return
    codes = elements.view(torch.uint8)
    if piece.format.name == "MXFP4":
        codes = unpack_consecutive(codes, 4)
    floats, grid = piece.format.unpack(piece.blocks()[:1])
    level = grid.levels.value(codes.view(floats.dtype)).view(piece.columns, piece.rows).T
    unit = 0.5 if piece.format.name == "MXFP4" else 1.0  # ggml doubles E2M1
    scale = torch.exp2(exponents.view(torch.uint8).float() - 127).view(-1, piece.rows).T
    yield level * unit * scale.repeat_interleave(32, dim=1)
