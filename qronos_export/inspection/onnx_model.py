"""An ONNX model, or a folder of a layout we write: what it holds, where its numbers lie, and whether they can be right.

Codes that MatMulNBits or GatherBlockQuantized reads are one tensor with their scales and zero points.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from formats import FORMATS
from formats.bits import unpack_consecutive
from qronos_export.artifact.onnx_data import check as check_data
from qronos_export.artifact.onnx_session import find_model
from qronos_export.errors import ArtifactError
from qronos_export.inspection.found import ERROR, NOTE, Entry, Finding, Inspection, TensorFacts, shown
from qronos_export.inspection.gguf_model import about_numbers
from qronos_export.inspection.numbers import CHUNK, Statistics, chunks, of_blocks
from qronos_export.inspection.onnx_package import read_package
from qronos_export.inspection.onnx_wire import Place, read_model

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16, TensorProto.INT16: 16,
    TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.BOOL: 8, TensorProto.FLOAT16: 16, TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32, TensorProto.UINT64: 64, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8, TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4,
    TensorProto.FLOAT8E8M0: 8, TensorProto.UINT2: 2, TensorProto.INT2: 2,
}  # fmt: skip
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16", TensorProto.BFLOAT16: "BF16"}
_LISTS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_QUANTIZED = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}  # inputs: codes, scales, zero points
_OPERATORS = 20  # named in the metadata
_DIMENSIONS = 64
_COLUMNS = 1 << 20  # of a quantized matrix whose numbers are read, a row at least at a time


@dataclass(frozen=True)
class _Stored:
    """An initializer whose bytes are where they should be."""

    tensor: TensorProto
    path: Path  # without links, so that a file has one name
    offset: int
    size: int

    @property
    def place(self) -> tuple[Path, int, int]:
        return self.path, self.offset, self.size


def inspect_onnx(path: Path, *, numbers: bool, check: bool) -> Inspection:
    """What `path`, a model or a folder with one, holds; with `numbers` each tensor's are read. With `check` there are
    findings. Raises UsageError where there is no model, ArtifactError where it cannot be read."""
    path = find_model(path)
    model, places = read_model(path)
    findings: list[Finding] = []
    stored: dict[str, _Stored] = {}
    for tensor, place in zip(model.graph.initializer, places, strict=True):
        wrong, found = _located(tensor, place, path)
        findings += [Finding(ERROR, tensor.name, what) for what in wrong]
        if found is not None:
            stored.setdefault(tensor.name, found)
    names = Counter(tensor.name for tensor in model.graph.initializer)
    findings += [
        Finding(ERROR, name, f"{count} initializers have this name") for name, count in names.items() if count > 1
    ]
    overlapping = list(_overlaps(stored))
    findings += [Finding(ERROR, name, f"its bytes overlap those of {other}") for name, other in overlapping]
    for name, _ in overlapping:
        del stored[name]
    tensors, wrong_tensors = _tensors(model, stored, numbers=numbers or check)
    package = read_package(path)
    findings += [*wrong_tensors, *about_numbers(tensors), *package.findings]
    sizes = {each.path: each.path.stat().st_size for each in stored.values()} | {path: path.stat().st_size}
    return Inspection(
        path=path,
        format=f"ONNX IR {model.ir_version}",
        bytes=sum(sizes.values()),
        metadata={**_metadata(model), **package.metadata},
        tokenizer=package.tokenizer,
        chat_templates=package.chat_templates,
        tensors=tensors,
        findings=findings if check else [],
    )


def _metadata(model: onnx.ModelProto) -> dict[str, Entry]:
    graph = model.graph
    found = {
        "producer": Entry("string", f"{model.producer_name} {model.producer_version}".strip()),
        "graph": Entry("string", graph.name),
        "opset": Entry("map", {each.domain or "ai.onnx": each.version for each in model.opset_import[:_OPERATORS]}),
        "operators": Entry("map", dict(Counter(node.op_type for node in graph.node).most_common(_OPERATORS))),
    }
    for key, values in (("inputs", graph.input), ("outputs", graph.output)):
        found[key] = Entry("array of string", [value.name for value in values[:8]], len(values))
    return found | {each.key: Entry("string", each.value) for each in model.metadata_props}


def _located(tensor: TensorProto, place: Place | None, model: Path) -> tuple[list[str], _Stored | None]:
    """What is wrong with where an initializer's numbers are, and where they are; None also where they are in lists of
    the model itself."""
    if tensor.data_type not in _BITS and tensor.data_type != TensorProto.STRING:
        return [f"it has the unknown type {tensor.data_type}"], None
    if len(tensor.dims) > _DIMENSIONS or any(size < 0 for size in tensor.dims):
        return [f"its shape {_shape(tensor)} … is impossible"], None
    count = math.prod(tensor.dims)
    expected = -(-count * _BITS.get(tensor.data_type, 0) // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        try:
            check_data(tensor, model.parent)
        except ArtifactError as error:
            return [shown(str(error))], None
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path, offset = (model.parent / entries["location"]).resolve(), int(entries.get("offset", 0))
        size = int(entries["length"]) if "length" in entries else path.stat().st_size - offset
    elif place is not None:
        path, (offset, size) = model, place
    else:
        lists = sum(len(getattr(tensor, name)) for name in _LISTS)
        packed = _BITS.get(tensor.data_type, 8) < 8 or tensor.data_type in (
            TensorProto.COMPLEX64,
            TensorProto.COMPLEX128,
        )
        if lists != count and not (packed and lists):
            return [f"it has {lists} numbers for the shape {_shape(tensor)}"], None
        return [], None
    if size != expected:
        return [f"it has {size} bytes; its type and shape need {expected}"], None
    width = _BITS.get(tensor.data_type, 8) // 8 or 1
    wrong = []
    if (
        tensor.data_location == TensorProto.EXTERNAL and offset % width
    ):  # which is mapped; protobuf itself aligns nothing
        wrong = [f"its offset {offset} is not aligned to its numbers' {width} bytes"]
    return wrong, _Stored(tensor, path, offset, size)


def _shape(tensor: TensorProto) -> list[int]:
    return list(tensor.dims[:_DIMENSIONS])


def _overlaps(stored: Mapping[str, _Stored]) -> Iterator[tuple[str, str]]:
    """Initializers whose bytes lie across those of others. The very same bytes under several names are one tensor."""
    last: dict[Path, tuple[str, tuple[Path, int, int], int]] = {}
    order = sorted(stored.items(), key=lambda item: (item[1].offset, -item[1].size))
    for name, each in order:
        if not each.size:
            continue
        before, place, end = last.get(each.path, ("", None, 0))
        if each.place == place:
            continue
        if each.offset < end:
            yield name, before
        if each.offset + each.size > end:
            last[each.path] = name, each.place, each.offset + each.size


def _tensors(
    model: onnx.ModelProto, stored: Mapping[str, _Stored], *, numbers: bool
) -> tuple[list[TensorFacts], list[Finding]]:
    """Quantized matrices, then the initializers that are part of none."""
    facts, findings = [], []
    taken: set[str] = set()
    seen: set[tuple[Path, int, int]] = set()
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in _QUANTIZED or not node.input:
            continue
        inputs = [node.input[n] if n < len(node.input) else "" for n in _QUANTIZED[node.op_type]]
        if inputs[0] in taken or not all(name in stored for name in filter(None, inputs)) or not all(inputs[:2]):
            continue  # shared, or made by other nodes, or already found to be nowhere
        codes, scales, *zeros = (stored[name] for name in inputs if name)
        try:
            matrix = _Matrix(node, codes, scales, zeros[0] if zeros else None)
        except _NoMatrix as error:
            if error.severity == ERROR:
                findings.append(Finding(ERROR, codes.tensor.name, f"{node.op_type}: {error}"))
            else:
                findings.append(Finding(NOTE, codes.tensor.name, f"{node.op_type}: {error}; its values were not read"))
            continue
        taken.update(filter(None, inputs))
        shared = codes.place in seen
        seen |= {part.place for part in (codes, scales, *zeros)}
        found = matrix.statistics() if numbers and not shared else None
        facts.append(replace(matrix.facts(), statistics=found, shared=shared))
    for name, tensor in initializers.items():
        if name in taken:
            continue
        count = math.prod(max(0, size) for size in _shape(tensor))
        kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in _BITS else f"type {tensor.data_type}"
        size = -(-count * _BITS[tensor.data_type] // 8) if tensor.data_type in _BITS else None
        place = stored.get(name)
        shared = place is not None and place.place in seen
        found = None
        if place is not None and not shared:
            seen.add(place.place)
            if numbers and tensor.data_type in _FLOATS and count > 1:  # one number alone may be an infinite mask
                fmt = FORMATS[_FLOATS[tensor.data_type]]
                found = of_blocks(fmt, chunks(place.path, place.offset, place.size, CHUNK * fmt.block_bytes))
        facts.append(TensorFacts(name, kind, tuple(_shape(tensor)), count, size, found, shared))
    return facts, findings


class _NoMatrix(Exception):
    """Initializers of a node that make no matrix. An error, or something that is not read here."""

    def __init__(self, what: str, severity: str = ERROR) -> None:
        super().__init__(what)
        self.severity = severity


class _Matrix:
    """Codes of a quantized matrix with scales and zero points, as onnxruntime's operators have them.

    codes: [rows, blocks · block · bits / 8] bytes, neighbours share one, the first lowest; scales: [rows, blocks];
    zeros: packed like codes and padded to bytes by the row, or None for 2^(bits − 1).
    """

    def __init__(self, node: NodeProto, codes: _Stored, scales: _Stored, zeros: _Stored | None) -> None:
        self._operator = node.op_type
        settings = {each.name: each.i for each in node.attribute if each.type == onnx.AttributeProto.INT}
        self.bits, self.block = settings.get("bits", 4), settings.get("block_size", 128)
        if self.block < 16 or self.block & (self.block - 1) or self.block > 1 << 16:
            raise _NoMatrix(f"block_size {self.block} is no power of 2 from 16 on")
        if not 2 <= self.bits <= 8:
            raise _NoMatrix(f"{self.bits} bits are not 2 to 8")
        if self.bits not in (2, 4, 8) or codes.tensor.data_type != TensorProto.UINT8:
            raise _NoMatrix(f"codes are {self.bits} bits in {TensorProto.DataType.Name(codes.tensor.data_type)}", NOTE)
        if scales.tensor.data_type not in _FLOATS:
            raise _NoMatrix(f"scales are {TensorProto.DataType.Name(scales.tensor.data_type)}", NOTE)
        if node.op_type == "MatMulNBits":
            self.rows, self.columns = settings.get("N", 0), settings.get("K", 0)
        else:
            dims = codes.tensor.dims
            if len(dims) != 2 or settings.get("quantize_axis", 1) != 1 or settings.get("gather_axis", 0) != 0:
                raise _NoMatrix("codes are no rows that are quantized along themselves", NOTE)
            self.rows, self.columns = dims[0], dims[1] * 8 // self.bits
        if self.rows < 1 or self.columns < 1:
            raise _NoMatrix(f"{self.rows} × {self.columns} is no shape")
        if self.columns > _COLUMNS:
            raise _NoMatrix(f"rows have {self.columns} columns", NOTE)
        self.blocks = -(-self.columns // self.block)
        self._code_bytes = self.blocks * self.block * self.bits // 8 if node.op_type == "MatMulNBits" else dims[1]
        self._scale_bytes = self.blocks * _BITS[scales.tensor.data_type] // 8
        self._zero_bytes = -(-self.blocks * self.bits // 8)
        if zeros is not None and zeros.tensor.data_type != TensorProto.UINT8:
            raise _NoMatrix(f"zero points are {TensorProto.DataType.Name(zeros.tensor.data_type)}", NOTE)
        for part, row_bytes, what in (
            (codes, self._code_bytes, "codes"),
            (scales, self._scale_bytes, "scales"),
            (zeros, self._zero_bytes, "zero points"),
        ):
            if part is not None and part.size != self.rows * row_bytes:
                raise _NoMatrix(
                    f"{what} have {part.size} bytes; {self.rows} × {self.columns} needs {self.rows * row_bytes}"
                )
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def facts(self) -> TensorFacts:
        size = sum(part.size for part in (self._codes, self._scales, self._zeros) if part is not None)
        kind = f"{self._operator} {self.bits} bits/{self.block}"
        return TensorFacts(self._codes.tensor.name, kind, (self.rows, self.columns), self.rows * self.columns, size)

    def statistics(self) -> Statistics:
        step = max(1, CHUNK // self.columns)
        found = Statistics()
        fmt = FORMATS[_FLOATS[self._scales.tensor.data_type]]
        zeros = None if self._zeros is None else self._rows(self._zeros, self._zero_bytes, step)
        parts = zip(
            self._rows(self._codes, self._code_bytes, step),
            self._rows(self._scales, self._scale_bytes, step),
            strict=True,
        )
        for codes, stored in parts:
            levels = unpack_consecutive(codes, self.bits).to(torch.float32)
            scales = fmt.dequantize(stored)
            if zeros is None:
                levels -= 2 ** (self.bits - 1)
            else:
                each = unpack_consecutive(next(zeros), self.bits)[:, : self.blocks].to(torch.float32)
                levels -= each.repeat_interleave(self.block, dim=1)[:, : levels.shape[1]]
            values = (levels * scales.repeat_interleave(self.block, dim=1)[:, : levels.shape[1]])[:, : self.columns]
            if self.columns % self.block == 0:
                found.add(values.reshape(-1, self.block), scales.view(-1, 1))
            else:
                found.add(values, scales)  # a row is a block: its last one is short
        return found

    @staticmethod
    def _rows(part: _Stored, row_bytes: int, step: int) -> Iterator[Tensor]:
        for data in chunks(part.path, part.offset, part.size, step * row_bytes):
            yield torch.frombuffer(data, dtype=torch.uint8).view(-1, row_bytes)
