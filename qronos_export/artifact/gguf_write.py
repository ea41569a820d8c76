"""A GGUF file written again: with our blocks, or with further metadata; everything else byte for byte as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from formats import BlockFormat
from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import TYPES, GGUFFile, StoredTensor
from qronos_export.errors import ArtifactError

Fact = str | int | float
"""A value of the metadata: written as a string, uint32 or float64."""

_KINDS = {
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT64,
}
_NUMBERS = {name: number for number, (name, *_) in TYPES.items()}


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
