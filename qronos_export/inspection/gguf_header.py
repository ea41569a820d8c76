"""The header of a GGUF file, read without trust: every length is compared with what is left before anything is read.

    "GGUF" | u32 version | u64 tensors | u64 keys | keys × (string, u32 type, value) | tensors × info | padding | data
    string: u64 length, bytes   array: u32 type, u64 count, values   info: string, u32 n, n × u64, u32 type, u64 offset

Versions 2 and 3, little endian. What is kept is bounded by `_KEPT`, what is walked by the file's size and `_ENTRIES`.
Upstream's reader makes an object of every entry of every array, and believes counts.

Source: gguf.md of ggml, and what llama.cpp b11549 refuses (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from os import SEEK_CUR
from pathlib import Path
from typing import BinaryIO

from qronos_export.artifact.gguf import TYPES
from qronos_export.errors import ArtifactError
from qronos_export.inspection.found import ERROR, Entry, Finding, shown

_KEYS = 1 << 16
_TENSORS = 1 << 18
_ENTRIES = 1 << 22  # strings in all arrays; the largest vocabularies and their merges have under a million
_STRING = 1 << 20  # bytes kept of a string
_TOKEN = 1 << 12  # and of a special token
_KEPT = 1 << 26  # bytes kept of all values
_FIRST = 8  # entries kept of an array
_NAME = 1 << 16  # bytes of a key, by the specification
_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"

_NUMBERS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<?"), 10: ("uint64", "<Q"), 11: ("int64", "<q"),
    12: ("float64", "<d"),
}  # fmt: skip
_TEXT, _ARRAY = 8, 9


class _Stop(Exception):
    """The header cannot be read beyond this; the message says why."""


@dataclass(frozen=True)
class Info:
    """A tensor as the header has it."""

    name: str
    name_bytes: int
    shape: tuple[int, ...]  # last is the row length
    kind: int  # ggml's number
    offset: int  # from the start of the data

    @property
    def type(self) -> str:
        return TYPES[self.kind][0] if self.kind in TYPES else f"type {self.kind}"

    @property
    def weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def divides(self) -> bool:
        """Whether rows are whole blocks, as far as the type is known."""
        return self.kind not in TYPES or self.shape[-1] % TYPES[self.kind][1] == 0

    @property
    def nbytes(self) -> int | None:
        if self.kind not in TYPES or not self.divides:
            return None
        _, block_size, block_bytes = TYPES[self.kind]
        return self.weights // block_size * block_bytes


@dataclass
class Header:
    """What could be read. `data` is where the tensors' bytes begin, None where the header broke off before."""

    path: Path
    version: int
    size: int
    metadata: dict[str, Entry] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)  # of arrays' first entries
    tensors: list[Info] = field(default_factory=list)
    alignment: int = 32
    data: int | None = None
    findings: list[Finding] = field(default_factory=list)

    def strings(self, key: str, indices: Collection[int]) -> dict[int, str]:
        """Those of `indices` in the array of strings `key` that it has; of long ones the beginning, and no more of
        them than are kept of all values."""
        found, following = {}, 0
        with self.path.open("rb") as file, suppress(_Stop):
            cursor = _Cursor(file, self.size)
            cursor.jump(self.places[key])
            for index in sorted({index for index in indices if 0 <= index < (self.metadata[key].count or 0)}):
                cursor.skip_strings(index - following, key)
                found[index] = str(cursor.text(key, _TOKEN).value)
                following = index + 1
        return found


class _Cursor:
    """A place in the file that only moves forward and never beyond the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.at = 0
        self.kept = 0

    @property
    def left(self) -> int:
        return self._size - self.at

    def jump(self, at: int) -> None:
        self._file.seek(at)
        self.at = at

    def need(self, count: int, what: str) -> None:
        if count > self.left:
            raise _Stop(f"{what} needs {count} bytes, and {self.left} are left: the file is truncated or damaged")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self._file.read(count)
        if len(data) < count:
            raise _Stop(f"{what}: the file became shorter while it was read")
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        if count < 4096:
            self.take(count, what)
        else:
            self.jump(self.at + count)

    def skip_strings(self, count: int, what: str) -> None:
        """As `text` would, but vocabularies are long."""
        read, left = self._file.read, self.left
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left -= 8 + length
            if left < 0:
                raise _Stop(f"{what} has a string that leaves the file: it is truncated or damaged")
            if length < 4096:
                read(length)
            else:
                self._file.seek(length, SEEK_CUR)
        self.at = self._size - left

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, keep: int) -> Entry:
        """A string, of which at most `keep` bytes stay."""
        length = self.u64(what)
        self.need(length, what)
        data = self.take(min(length, keep), what)
        self.skip(length - len(data), what)
        self.kept += len(data)
        if self.kept > _KEPT:
            raise _Stop(f"{what}: metadata takes more than {_KEPT >> 20} MiB, which that of no model does")
        return Entry("string", data.decode("utf-8", "backslashreplace"), None if length <= keep else length)


def read_header(path: Path) -> Header:
    """Raises ArtifactError where `path` is no GGUF of version 2 or 3. Whatever is wrong further on is a finding of the
    header, which ends there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _header(path, _Cursor(file, size), size)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def _header(path: Path, cursor: _Cursor, size: int) -> Header:
    if size < 24 or cursor.take(4, "magic") != b"GGUF":
        raise ArtifactError(f"{path} is no GGUF file: it does not begin with GGUF and 20 bytes more.")
    version = cursor.u32("version")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            why = "It is big endian; convert it with gguf-py's gguf_convert_endian on the machine it was made for"
        else:
            why = "Versions 2 and 3 are read, as by llama.cpp; convert the model again with a present llama.cpp"
        raise ArtifactError(f"{path} says that it is GGUF of version {version}. {why}.")
    header = Header(path, version, size)
    try:
        _read(cursor, header)
    except _Stop as stop:
        header.findings.append(Finding(ERROR, f"header, byte {cursor.at}", shown(str(stop))))
    return header


def _read(cursor: _Cursor, header: Header) -> None:
    tensors, keys = cursor.u64("number of tensors"), cursor.u64("number of keys")
    for count, limit, least, what in ((keys, _KEYS, 13, "keys"), (tensors, _TENSORS, 24, "tensors")):
        if count > min(limit, cursor.left // least):
            raise _Stop(f"{count} {what} are more than {'a file of this size' if count <= limit else 'any file'} has")
    entries = 0
    for index in range(keys):
        key = _name(cursor, f"key {index}", _NAME)
        if key in header.metadata:
            header.findings.append(Finding(ERROR, key, "the key is there twice; llama.cpp refuses that"))
        entry, at = _value(cursor, f"the value of {key}", _ENTRIES - entries)
        if entry.kind == "array of string":
            entries += entry.count or 0
        header.metadata.setdefault(key, entry)
        if at is not None:
            header.places.setdefault(key, at)
    header.alignment = _alignment(header)
    for index in range(tensors):
        header.tensors.append(_info(cursor, index))
    header.data = cursor.at + -cursor.at % header.alignment


def _name(cursor: _Cursor, what: str, limit: int) -> str:
    entry = cursor.text(what, limit)
    if entry.count is not None:
        raise _Stop(f"{what} is a name of {entry.count} bytes; at most {limit} are allowed")
    return str(entry.value)


def _value(cursor: _Cursor, what: str, strings: int) -> tuple[Entry, int | None]:
    """A value, and of an array where its first entry is. `strings`: how many an array may have."""
    kind = cursor.u32(what)
    if kind == _TEXT:
        return cursor.text(what, _STRING), None
    if kind in _NUMBERS:
        return Entry(_NUMBERS[kind][0], _number(cursor, kind, what)), None
    if kind != _ARRAY:
        raise _Stop(f"{what} has the unknown type {kind}")
    kind, count = cursor.u32(what), cursor.u64(what)
    at = cursor.at
    if kind in _NUMBERS:
        width = struct.calcsize(_NUMBERS[kind][1])
        first = [_number(cursor, kind, what) for _ in range(min(count, _FIRST))]
        cursor.skip((count - len(first)) * width, what)
        return Entry(f"array of {_NUMBERS[kind][0]}", first, count), at
    if kind != _TEXT:
        raise _Stop(f"{what} is an array of type {kind}; llama.cpp reads arrays of numbers and strings alone")
    if count > min(strings, cursor.left // 8):
        raise _Stop(
            f"{what} is an array of {count} strings, more than {'fit' if count <= strings else 'any model has'}"
        )
    texts = [cursor.text(what, _STRING).value for _ in range(min(count, _FIRST))]
    cursor.skip_strings(count - len(texts), what)
    return Entry("array of string", texts, count), at


def _number(cursor: _Cursor, kind: int, what: str) -> int | float | bool:
    code = _NUMBERS[kind][1]
    (number,) = struct.unpack(code, cursor.take(struct.calcsize(code), what))
    assert isinstance(number, int | float)
    return number


def _alignment(header: Header) -> int:
    entry = header.metadata.get(_ALIGNMENT, Entry("uint32", 32))
    if entry.kind == "uint32" and entry.value and entry.value & (entry.value - 1) == 0:
        return int(entry.value)
    header.findings.append(
        Finding(ERROR, _ALIGNMENT, f"{shown(str(entry.value))[:80]} ({entry.kind}) is no power of 2")
    )
    return 32


def _info(cursor: _Cursor, index: int) -> Info:
    before = cursor.at
    name = _name(cursor, f"the name of tensor {index}", _NAME)
    length = cursor.at - before - 8
    dimensions = cursor.u32(name)
    if dimensions > _DIMENSIONS:
        raise _Stop(f"tensor {name} has {dimensions} dimensions; ggml has at most {_DIMENSIONS}")
    sizes = [cursor.u64(name) for _ in range(dimensions)]
    return Info(name, length, tuple(reversed(sizes)) or (1,), cursor.u32(name), cursor.u64(name))
