"""GGUF files: a float file by upstream's converter in, the same file with our blocks out.

The float file is the oracle for names, metadata, tokenizer and the order of rows. Its tensors are matched to ours by
content: a row of a GGUF tensor is one of our float rows, so a hash of each row finds the tensor and the permutation at
once, also through fused or stacked (mixture-of-experts) tensors. There is no name map and no permutation code here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from formats import FORMATS, BlockFormat
from qronos_export.errors import ArtifactError

_CHUNK = 1 << 22  # weights hashed or read at a time

Fact = str | int | float
"""A value of the metadata: written as a string, uint32 or float64."""

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
        step = max(1, _CHUNK // tensor.columns)
        for first in range(0, tensor.rows, step):
            yield fmt.dequantize(torch.from_numpy(self.bytes(name, first, min(step, tensor.rows - first))))


def row_hashes(weights: Tensor) -> Tensor:
    """A 64-bit hash of the bits of every row: int64 [rows] for float32 `weights` [rows, columns]."""
    generator = torch.Generator().manual_seed(0x51A05)
    keys = torch.randint(-(2**63), 2**63 - 1, (weights.shape[1],), generator=generator).to(weights.device)
    hashes = [
        ((part + 0.0).contiguous().view(torch.int32).to(torch.int64) * keys).sum(1)  # + 0.0: both zeros hash alike
        for part in weights.split(max(1, _CHUNK // weights.shape[1]))
    ]
    return torch.cat(hashes)


def _places(keys: Tensor, wanted: Tensor) -> Tensor | None:
    """For each of `wanted` an entry of the sorted `keys` that equals it, no entry twice; None where that cannot be."""
    ordered, permutation = wanted.sort(stable=True)
    if len(keys) < len(wanted):
        return None
    first, last = torch.searchsorted(keys, ordered), torch.searchsorted(keys, ordered, right=True)
    # The first of equal numbers takes the first of its entries, the second the second.
    nth = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)
    place = first + nth
    if not bool((place < last).all()):
        return None
    return torch.empty_like(place).scatter_(0, permutation, place)


class RowIndex:
    """Finds, for weights of ours, the tensors of a float GGUF file that hold their rows, and in which order."""

    def __init__(self, file: GGUFFile, names: list[str]) -> None:
        """`names`: the tensors that may be matched. Reads them once; keeps 8 bytes a row."""
        self._file = file
        self._hashes = {name: torch.cat([row_hashes(part) for part in file.floats(name)]) for name in names}

    @property
    def unmatched(self) -> list[str]:
        """Tensors that no weight has claimed so far, in file order."""
        return list(self._hashes)

    def leave(self, names: list[str]) -> None:
        """Only `names` are left to be matched."""
        self._hashes = {name: self._hashes[name] for name in names}

    def match(self, weights: Mapping[str, Tensor]) -> list[Target]:
        """Claim every tensor all of whose rows are rows of `weights` (name -> float32 [rows, columns]).

        Of several tensors with the same content (merges that repeat layers) the first unclaimed one is taken.
        """
        names = list(weights)
        hashes = {name: row_hashes(weight).cpu() for name, weight in weights.items()}
        if not hashes:
            return []
        keys = torch.cat(list(hashes.values()))
        owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(h) for h in hashes.values()]))
        row = torch.cat([torch.arange(len(h)) for h in hashes.values()])
        keys, permutation = keys.sort(stable=True)
        owner, row = owner[permutation], row[permutation]
        alone = torch.ones_like(keys, dtype=torch.bool)
        alone[1:] &= keys[1:] != keys[:-1]
        alone[:-1] &= keys[1:] != keys[:-1]
        free = torch.ones_like(alone)
        targets: list[Target] = []
        begins = torch.isin(torch.stack([wanted[0] for wanted in self._hashes.values()]), keys) if self._hashes else ()
        for (tensor, wanted), possible in zip(list(self._hashes.items()), begins, strict=True):
            if not possible:  # nearly all tensors of a deep model
                continue
            # Rows that exist once tell whose tensor this is; of rows that exist several times its own go first.
            owners = owner[alone & torch.isin(keys, wanted)].unique()
            place = None
            for entries in ((free & torch.isin(owner, owners)).nonzero()[:, 0], free.nonzero()[:, 0]):
                if place is None and (found_at := _places(keys[entries], wanted)) is not None:
                    place = entries[found_at]
            if place is None:
                continue
            found = [
                Target(tensor, names[index], row[place[mine]], mine.nonzero()[:, 0])
                for index in owner[place].unique().tolist()
                for mine in [owner[place] == index]
            ]
            self._verify(tensor, found, weights)
            targets += found
            free[place] = False
            del self._hashes[tensor]
        return targets

    def _verify(self, tensor: str, targets: list[Target], weights: Mapping[str, Tensor]) -> None:
        """Hashes only propose; the floats themselves decide."""
        first = 0
        for part in self._file.floats(tensor):
            last = first + len(part)
            for target in targets:
                here = (target.file_rows >= first) & (target.file_rows < last)
                ours = weights[target.source][target.rows[here].to(weights[target.source].device)].cpu()
                if not torch.equal(part[target.file_rows[here] - first], ours):
                    raise ArtifactError(f"rows of {tensor} hash like rows of {target.source} but differ.")
            first = last


class BlockStore:
    """Finished blocks on disk, one file a tensor, with a hash of every row's values as the quantized stream used it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.formats: dict[str, BlockFormat] = {}
        self._scales: dict[str, Tensor] = {}
        self._calibrated: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def put(
        self, tensor: StoredTensor, fmt: BlockFormat, file_rows: Tensor, blocks: Tensor, values: Tensor, scales: Tensor
    ) -> None:
        """Store `blocks` uint8 [n, row_bytes] at `file_rows` [n]. In the calibrated model they stand for `values`
        float32 [n, columns], times `scales` [n], which are the same for all rows of a tensor or of an expert in it."""
        name = tensor.name
        fresh = name not in self.formats
        if fresh:
            self.formats[name] = fmt
            self._calibrated[name] = torch.zeros(tensor.rows, dtype=torch.int64)
            self._missing[name] = tensor.rows
            self._scales[name] = torch.full((tensor.experts,), torch.nan)
        self._set_scales(name, tensor.expert(file_rows), scales.cpu())
        shape = tensor.rows, fmt.row_bytes(tensor.columns)
        if fresh:
            _reserve(self.path(name), shape[0] * shape[1])
        data = np.memmap(self.path(name), dtype=np.uint8, mode="r+", shape=shape)
        data[file_rows.numpy()] = blocks.cpu().numpy()
        data.flush()
        self._calibrated[name][file_rows] = row_hashes(values).cpu()
        self._missing[name] -= len(file_rows)

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a finished tensor: uint8 [rows, row_bytes]."""
        return np.fromfile(self.finished(name), dtype=np.uint8).reshape(len(self._calibrated[name]), -1)

    def finished(self, name: str) -> Path:
        """The file with all blocks of a tensor. Raises ArtifactError where some are missing."""
        if self._missing[name]:
            raise ArtifactError(f"{self._missing[name]} rows of {name} were never rounded.")
        return self.path(name)

    def take(self, tensor: StoredTensor, fmt: BlockFormat, scales: Tensor, calibrated: Tensor) -> None:
        """A tensor whose file an earlier process finished, with what `scale` and `calibrated` said there."""
        self.formats[tensor.name] = fmt
        self._scales[tensor.name] = scales
        self._calibrated[tensor.name] = calibrated
        self._missing[tensor.name] = 0

    def calibrated(self, name: str) -> Tensor:
        """Hash of each row's values in the calibrated model, in file order: int64 [rows]."""
        return self._calibrated[name]

    def scale(self, name: str) -> Tensor:
        """What the blocks' values are multiplied by in the calibrated model: float32 [experts]."""
        return self._scales[name]

    def _set_scales(self, name: str, expert: Tensor, scales: Tensor) -> None:
        known = self._scales[name][expert]
        if not bool(((known == scales) | known.isnan()).all()):
            raise ArtifactError(f"rows of one matrix of {name} were given different scales.")
        self._scales[name][expert] = scales

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """Scales that tensors need beside their blocks, by the name llama.cpp looks for: float32 [experts]."""
        return {
            f"{name.removesuffix('.weight')}.scale": scales.numpy()
            for name, scales in self._scales.items()
            if bool((scales != 1).any())
        }

    def discard(self) -> None:
        """Delete the blocks; the artifact holds them now."""
        shutil.rmtree(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.blocks"


def _reserve(path: Path, size: int) -> None:
    """A file of `size` bytes whose space is taken: a full disk is an OSError here, in a mapped file it kills."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, _CHUNK):
                file.write(bytes(min(_CHUNK, size - start)))


def lineage(source: GGUFFile, repository: str) -> dict[str, Fact]:
    """The keys by which upstream's converter names the hub's model `repository` (owner/name) that a file was made from.

    `general.source.*` is what was converted. `general.base_model.*` are the parents of a model: those that its card
    states are in `source` already, else the quantized file's parent is the model itself.
    """
    url = f"https://huggingface.co/{repository}"
    facts: dict[str, Fact] = {gguf.Keys.General.SOURCE_REPO_URL: url}
    if source.stated(gguf.Keys.General.BASE_MODEL_COUNT) is None:
        organization, _, name = repository.partition("/")
        facts[gguf.Keys.General.BASE_MODEL_COUNT] = 1
        facts[gguf.Keys.General.BASE_MODEL_NAME.format(id=0)] = gguf.Metadata.id_to_title(name)
        facts[gguf.Keys.General.BASE_MODEL_ORGANIZATION.format(id=0)] = gguf.Metadata.id_to_title(organization)
        facts[gguf.Keys.General.BASE_MODEL_REPO_URL.format(id=0)] = url
    return facts


def write_gguf(
    source: GGUFFile,
    store: BlockStore,
    file_type: int,
    destination: Path,
    facts: Mapping[str, Fact] | None = None,
) -> None:
    """Write `source` again with the tensors of `store` in their blocks; everything else byte for byte as it is.

    file_type: llama.cpp's number of the mix, for `general.file_type`.
    facts: further metadata. A key that `source` has gets the new value.
    """
    writer = _begun(source, store.formats, store.scales, file_type, destination, facts or {})
    for tensor in source.tensors.values():
        writer.write_tensor_data(
            store.blocks(tensor.name) if tensor.name in store.formats else source.bytes(tensor.name)
        )
    for scales in store.scales.values():
        writer.write_tensor_data(scales)
    writer.close()


def restate(file: GGUFFile, facts: Mapping[str, Fact], destination: Path) -> None:
    """Write `file` again with further metadata, its tensors byte for byte. Raises ArtifactError where they are not."""
    kind = file.stated(gguf.Keys.General.FILE_TYPE)
    writer = _begun(file, {}, {}, int(kind or 0), destination, facts)
    for name in file.tensors:
        writer.write_tensor_data(file.bytes(name))
    writer.close()
    written = GGUFFile(destination)
    for name, tensor in file.tensors.items():
        found = written.tensors.get(name)
        if found is None or replace(found, offset=tensor.offset) != tensor:
            raise ArtifactError(f"{destination} has {found} where {file.path} has {tensor}; report this.")
        if not np.array_equal(written.bytes(name), file.bytes(name)):
            raise ArtifactError(f"{destination} has other bytes in {name} than {file.path}; the disk may be failing.")


def written_bytes(
    source: GGUFFile,
    formats: Mapping[str, BlockFormat],
    file_type: int,
    scratch: Path,
    facts: Mapping[str, Fact],
) -> int:
    """How large the file would be that `write_gguf` writes for tensors in `formats` without scales beside them. Writes
    its header to `scratch`."""
    writer = _begun(source, formats, {}, file_type, scratch, facts)
    writer.close()
    alignment = source.reader.alignment
    sizes = [scratch.stat().st_size, *(_stored(tensor, formats) for tensor in source.tensors.values())]
    return sum(-(-size // alignment) * alignment for size in sizes)


def _begun(
    source: GGUFFile,
    formats: Mapping[str, BlockFormat],
    scales: Mapping[str, np.ndarray],
    file_type: int,
    destination: Path,
    facts: Mapping[str, Fact],
) -> gguf.GGUFWriter:
    """A file whose header is written: the metadata of `source`, and its tensors in `formats` where they have one."""
    writer = gguf.GGUFWriter(destination, arch="", use_temp_file=False)
    writer.kv_data[0].clear()
    for field in source.reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    writer.data_alignment = source.reader.alignment
    writer.kv_data[0].pop(gguf.Keys.General.FILE_TYPE, None)
    writer.kv_data[0].pop(gguf.Keys.General.QUANTIZATION_VERSION, None)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    for key, value in facts.items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, _KINDS[type(value)])

    for tensor in source.tensors.values():
        fmt = formats.get(tensor.name)
        kind: Any = _NUMBERS[tensor.type if fmt is None else fmt.name]  # upstream's enum lacks the newest types
        shape = tensor.shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), _stored(tensor, formats), raw_dtype=kind)
    for name, values in scales.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _stored(tensor: StoredTensor, formats: Mapping[str, BlockFormat]) -> int:
    fmt = formats.get(tensor.name)
    return tensor.nbytes if fmt is None else tensor.rows * fmt.row_bytes(tensor.columns)


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


def verify_gguf(path: Path, source: GGUFFile, store: BlockStore) -> GGUFFile:
    """Reopen a written file and compare every tensor: calibrated values = our dequantize = gguf-py's dequantize of the
    file's bytes, and untouched tensors equal the float file's. Raises ArtifactError naming the first difference.

    Types that gguf-py cannot dequantize (Q1_0, Q2_0) are compared without it.
    """
    written = GGUFFile(path)
    if list(written.tensors) != [*source.tensors, *store.scales]:
        raise ArtifactError(f"{path} does not hold the tensors of {source.path}.")
    for name, scales in store.scales.items():
        if not np.array_equal(written.bytes(name).view(np.float32)[0], scales):
            raise ArtifactError(f"{path}: {name} is not what was calibrated.")
    for name in source.tensors:
        tensor, data = written.tensors[name], written.bytes(name)
        if name not in store.formats:
            if not np.array_equal(data, source.bytes(name)):
                raise ArtifactError(f"{path}: {name} changed though it was not quantized.")
            continue
        fmt, expected = store.formats[name], store.calibrated(name)
        step = max(1, _CHUNK // tensor.columns)
        for first in range(0, tensor.rows, step):
            part = data[first : first + step]
            ours = fmt.dequantize(torch.from_numpy(part))
            if not torch.equal(row_hashes(ours), expected[first : first + step]):
                raise ArtifactError(f"{path}: {name} is not what was calibrated.")
            theirs = _upstream(part, fmt)
            if theirs is not None and not np.array_equal(ours.numpy(), theirs):
                raise ArtifactError(f"{path}: gguf reads {name} ({fmt.name}) differently than it was calibrated.")
    return written


UNKNOWN_UPSTREAM = frozenset({"Q1_0", "Q2_0"})
"""Types that gguf-py has no dequantize for."""
_KINDS = {
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT64,
}
_NUMBERS = {name: number for number, (name, *_) in TYPES.items()}


def _upstream(data: np.ndarray, fmt: BlockFormat) -> np.ndarray | None:
    """gguf-py's dequantize, which wants F32 and F16 as such and everything else as bytes; None for types it lacks."""
    if fmt.name in UNKNOWN_UPSTREAM:
        return None
    typed = data.view({"F32": np.float32, "F16": np.float16}.get(fmt.name, np.uint8))
    return gguf.quants.dequantize(typed, gguf.GGMLQuantizationType[fmt.name])
