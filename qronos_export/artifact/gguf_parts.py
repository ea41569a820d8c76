"""How large the parts are that llama-gguf-split makes of a GGUF file, without writing them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile, islice

from qronos_export.artifact.gguf import GGUFFile, StoredTensor

_ALIGNMENT = 32
_HEADER = 4 + 4 + 8 + 8  # magic, version, counts of tensors and keys
_SPLIT_KEYS = sum(
    8 + len(key) + 4 + size for key, size in (("split.no", 2), ("split.count", 2), ("split.tensors.count", 4))
)


def part_bytes(file: GGUFFile, counts: Sequence[int]) -> list[int]:
    """Bytes of each part, which are given by their `counts` of tensors. The first one has the metadata of `file`.

    header | metadata of the file | keys of the split | names, shapes, types and places of the tensors | tensors
    (b11549, tools/gguf-split/gguf-split.cpp)
    """
    fields = (field for field in file.reader.fields.values() if not field.name.startswith("GGUF."))
    metadata = sum(part.nbytes for field in fields for part in field.parts)
    tensors = iter(file.tensors.values())
    sizes = []
    for count in counts:
        mine = list(islice(tensors, count))
        head = _HEADER + metadata + _SPLIT_KEYS + sum(map(_described, mine))
        sizes.append(sum(map(_padded, (head, *(tensor.nbytes for tensor in mine)))))
        metadata = 0
    return sizes


def _described(tensor: StoredTensor) -> int:
    """u64 length, name | u32 dimensions, u64 each, without the last ones that are 1 | u32 type | u64 place"""
    dimensions = len(list(dropwhile(lambda size: size == 1, tensor.shape))) or 1
    return 8 + len(tensor.name.encode()) + 4 + 8 * dimensions + 4 + 8


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
