"""An ONNX model parsed without its weights: their bytes stay in the file, and what is parsed is bounded.

protobuf makes objects of every field it meets, some sixty times as large as an empty message in the file. So before it
sees anything the two outer levels of the wire format are walked here,

    ModelProto.graph = 7    GraphProto.initializer = 5    TensorProto.raw_data = 9

and the model is put together again without `raw_data`.

Source: protobuf's encoding, onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from qronos_export.errors import ArtifactError
from qronos_export.inspection.found import shown

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_STRUCTURE = 1 << 23  # bytes of a model beside its weights; a decoder's layer has some ten thousand
_FIELDS = 1 << 18
_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}

Place = tuple[int, int]
"""Offset and length in the file."""


class _Walk:
    """The fields of a file, each looked at once; there may be so many."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self._fields = 0

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Of the message between `at` and `end`: number, where the field begins, where its content, where it ends."""
        while at < end:
            self._fields += 1
            if self._fields > _FIELDS:
                raise self.broken(at, f"more than {_FIELDS} fields, which no model has")
            start = at
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            content = at
            if kind == _VARINT:
                _, at = self._varint(at, end)
            elif kind == _LENGTH:
                length, content = self._varint(at, end)
                at = content + length
            elif kind in _FIXED:
                at += _FIXED[kind]
            else:
                raise self.broken(start, f"a field of kind {kind}")
            if number == 0 or at > end:
                raise self.broken(start, "a field that leaves what it is in: the file is truncated or damaged")
            yield number, start, content if kind == _LENGTH else at, at

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise self.broken(at, "a number that is cut off")
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise self.broken(at, "a number of more than ten bytes")

    def broken(self, at: int, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be read as ONNX: byte {at} begins {what}.")


def read_model(path: Path) -> tuple[onnx.ModelProto, list[Place | None]]:
    """The model without the raw data of its initializers, and for each of these where that is in the file.

    Raises ArtifactError where the file is no ONNX, or holds more beside its weights than any model does.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            lean, places = _lean(_Walk(path, data))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"{path} cannot be read as ONNX: {error}.") from error
    try:
        model = onnx.ModelProto.FromString(lean)
    except Exception as error:  # protobuf's DecodeError is not importable from a stable place
        raise ArtifactError(f"{path} cannot be read as ONNX: {shown(str(error))}.") from error
    if not _all_text(model):
        raise ArtifactError(f"{path} cannot be read as ONNX: a name in it is no UTF-8.")
    if not model.graph.node and not model.graph.initializer:
        raise ArtifactError(f"{path} cannot be read as ONNX: it has no graph.")
    return model, places


def _all_text(message: Any) -> bool:
    """Whether all strings are; what is no UTF-8 protobuf hands over as bytes."""
    for field, value in message.ListFields():
        several = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_MESSAGE and not all(_all_text(each) for each in several):
            return False
        if field.type == field.TYPE_STRING and not all(isinstance(each, str) for each in several):
            return False
    return True


def _lean(walk: _Walk) -> tuple[bytes, list[Place | None]]:
    parts: list[bytes] = []
    places: list[Place | None] = []
    size = 0

    def keep(start: int, end: int) -> bytes:
        nonlocal size
        size += end - start
        if size > _STRUCTURE:
            raise walk.broken(start, f"what makes more than {_STRUCTURE >> 20} MiB beside the initializers' raw data")
        return walk.data[start:end]

    for number, start, content, end in walk.fields(0, len(walk.data)):
        if number != _GRAPH:
            parts.append(keep(start, end))
            continue
        graph = []
        for inner, start_inner, content_inner, end_inner in walk.fields(content, end):
            if inner != _INITIALIZER:
                graph.append(keep(start_inner, end_inner))
                continue
            place, tensor = None, []
            for each, start_each, content_each, end_each in walk.fields(content_inner, end_inner):
                if each == _RAW_DATA:
                    place = content_each, end_each - content_each
                else:
                    tensor.append(keep(start_each, end_each))
            graph.append(_message(_INITIALIZER, tensor))
            places.append(place)
        parts.append(_message(_GRAPH, graph))
    return b"".join(parts), places


def _message(number: int, parts: list[bytes]) -> bytes:
    content = b"".join(parts)
    length, encoded = len(content), bytearray([number << 3 | _LENGTH])
    while length >= 0x80:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + content
