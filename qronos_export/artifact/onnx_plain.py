"""Matrices and decoders in ONNX's standard operators alone, for any runtime.

    product   MatMul(x, DequantizeLinear(codes [in, out], scales [in / block, out], zeros, axis 0, block))
    lookup    DequantizeLinear(Gather(codes [rows, in]), Gather(scales [rows, in / block]), axis 2, block)

Codes are INT4, INT8 or INT2 where they are centred, else UINT4, …; those of a lookup always take a byte, since Gather
knows no smaller ones. Opset 21; 25 where there are codes of 2 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final

import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from formats.bits import pack_consecutive, unpack_consecutive
from qronos_export.artifact import onnx_mx
from qronos_export.artifact.onnx_blocks import MX_TYPES, Container
from qronos_export.artifact.onnx_data import DataFile
from qronos_export.artifact.onnx_decoder import Decoder
from qronos_export.artifact.onnx_graph import Piece, Style

_SIGNED = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
_UNSIGNED = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}


@final
class Plain(Style):
    """`head_size` is what the builder's graph does not say, `widths` are the last dimensions of its initializers.
    `mx`: products with Microscaling weights in ONNX's own types for them (onnx_mx.py)."""

    def __init__(self, data: DataFile, head_size: int, widths: Mapping[str, int], mx: bool = False) -> None:
        super().__init__(data)
        self._decoder = Decoder(self, head_size, widths)
        self._mx = mx

    def other(self, node: NodeProto) -> None:
        self._decoder.add(node)

    def product(self, name: str, x: str, y: str, piece: Piece) -> None:
        if self._mx and piece.format.name in MX_TYPES:
            self.opset = max(self.opset, onnx_mx.OPSET)
            onnx_mx.product(self, name, x, y, piece)
        else:
            super().product(name, x, y, piece)

    def scaled_product(self, name: str, x: str, y: str, piece: Piece, container: Container) -> None:
        bits, shape = container.bits, (piece.columns, piece.rows)
        blocks = piece.columns // container.block, piece.rows
        if bits == 2:
            self.opset = 25

        def codes() -> Tensor:
            found = unpack_consecutive(self.parts(piece).codes, bits).T
            return _packed(found ^ 2 ** (bits - 1) if container.centred else found, bits)

        def zeros() -> Tensor:
            found = self.parts(piece).zeros
            assert found is not None
            return _packed(unpack_consecutive(found, bits)[:, : blocks[0]].T, bits)

        kind = _SIGNED[bits] if container.centred else _UNSIGNED[bits]
        inputs = [
            self.put(f"{name}_codes", (piece.key, "product", "codes"), codes, shape, kind),
            self.put(f"{name}_scales", (piece.key, "product", "scales"), lambda: self.parts(piece).scales.T, blocks),
        ]
        if not container.centred:
            inputs.append(self.put(f"{name}_zeros", (piece.key, "product", "zeros"), zeros, blocks, kind))
        weight = self.add("DequantizeLinear", inputs, f"{y}/weight", axis=0, block_size=container.block)
        self.add("MatMul", [x, weight], y)

    def scaled_lookup(self, name: str, ids: str, y: str, piece: Piece, container: Container) -> None:
        blocks = piece.rows, piece.columns // container.block
        signed = container.zero is not None

        def codes() -> Tensor:
            found = unpack_consecutive(self.parts(piece).codes, container.bits)
            return (found - (container.zero or 0)).view(torch.int8) if signed else found

        def zeros() -> Tensor:
            found = self.parts(piece).zeros
            assert found is not None
            return unpack_consecutive(found, container.bits)[:, : blocks[1]]

        def gathered(kind: str, numbers: Callable[[], Tensor], shape: tuple[int, int]) -> str:
            table = self.put(f"{name}_rows_{kind}", (piece.key, "lookup", kind), numbers, shape)
            return self.add("Gather", [table, ids], f"{y}/{kind}")

        inputs = [
            gathered("codes", codes, (piece.rows, piece.columns)),
            gathered("scales", lambda: self.parts(piece).scales, blocks),
        ]
        if not signed:
            inputs.append(gathered("zeros", zeros, blocks))
        self.add("DequantizeLinear", inputs, y, axis=2, block_size=container.block)

    def copies(self, piece: Piece) -> Iterator[Tensor]:
        yield from onnx_mx.values(self, piece)
        yield from super().copies(piece)

    def scaled_copies(self, piece: Piece, container: Container) -> Iterator[Tensor]:
        rows, columns, bits = piece.rows, piece.columns, container.bits
        if (scales := self.read((piece.key, "product", "scales"))) is not None:
            levels = self._codes((piece.key, "product", "codes"), bits, container.centred, columns * rows)
            levels = levels.view(columns, rows).T
            zeros = None
            if not container.centred:
                zeros = self._codes((piece.key, "product", "zeros"), bits, False, len(scales)).view(-1, rows).T
            offsets = self.read((piece.key, "offsets transposed"))
            yield _values(levels, scales.view(-1, rows).T, zeros, None if offsets is None else offsets.view(-1, rows).T)
        if (scales := self.read((piece.key, "lookup", "scales"))) is not None:
            zeros, offsets = self.read((piece.key, "lookup", "zeros")), self.read((piece.key, "offsets"))
            levels = self.require((piece.key, "lookup", "codes"))
            zeros, offsets = (None if part is None else part.view(rows, -1) for part in (zeros, offsets))
            yield _values(levels.view(rows, -1), scales.view(rows, -1), zeros, offsets)

    def _codes(self, key: object, bits: int, signed: bool, count: int) -> Tensor:
        """The integers of a packed tensor, float32 [count]."""
        codes, half = unpack_consecutive(self.require(key).view(torch.uint8), bits)[:count], 2 ** (bits - 1)
        return (codes ^ half).float() - half if signed else codes.float()


def _values(levels: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None) -> Tensor:
    """What a runtime makes of numbers [rows, …]: float32 [rows, columns]."""

    def spread(numbers: Tensor) -> Tensor:
        return numbers.float().repeat_interleave(levels.shape[1] // numbers.shape[1], dim=1)

    found = (levels.float() if zeros is None else levels.float() - spread(zeros)) * spread(scales)
    return found if offsets is None else found + spread(offsets)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 of any shape → bytes, neighbours of the whole tensor sharing one."""
    flat = codes.reshape(-1)
    return pack_consecutive(torch.nn.functional.pad(flat, (0, -len(flat) % (8 // bits))), bits)
