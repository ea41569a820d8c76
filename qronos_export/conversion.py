"""A quantized GGUF file, ours or anyone's, as ONNX with the very same integers and scales. Nothing is rounded again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from formats import FORMATS
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.checkpoint import open_checkpoint, unpack
from qronos_export.errors import CheckpointError, UsageError
from qronos_export.events import Stage
from qronos_export.onnx_export import float_graph, onnx_folder, write_onnx
from qronos_export.recipe import ACCURACY_LEVELS, ARTIFACTS
from qronos_export.report import Artifact
from qronos_export.workspace import check_space, workspace


def convert(
    file: Path,
    output: Path,
    layouts: Sequence[str],
    *,
    accuracy_level: int = 4,
    like: str | None = None,
    force: bool = False,
) -> Iterator[Stage | tuple[Artifact, list[str]]]:
    """Write `file` as `output`/<its name>-<layout>, one folder for each of `layouts`; ends with their lines and notes.

    like: MODEL whose configuration and tokenizer to take; otherwise what transformers reads out of the file.

    Raises UsageError for what cannot be converted, CheckpointError for a file that transformers cannot read back.
    """
    check_packages()
    if odd := [each for each in layouts if each not in ARTIFACTS or each == "gguf"]:
        raise UsageError(f"--artifact is {odd[0]!r}; expected {', '.join(ARTIFACTS[1:])}.")
    if len(set(layouts)) < len(layouts):
        raise UsageError(f"--artifact is {','.join(layouts)!r}; expected each once.")
    if accuracy_level not in ACCURACY_LEVELS:
        raise UsageError(f"--accuracy-level is {accuracy_level}; expected 0 (float) or 4 (int8 inputs).")
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give the quantized .gguf.")
    source = GGUFFile(file)
    _check(source)
    if not like:
        _check_configuration(source)
    folders = [onnx_folder(output / file.name, layout) for layout in layouts]
    with workspace(output, folders, force) as folder:
        yield Stage("read")
        pattern = open_checkpoint(like).folder if like else None
        floats = 4 * sum(tensor.rows * tensor.columns for tensor in source.tensors.values())
        check_space(folder, 3 * floats)  # the checkpoint, the builder's graph, ours
        try:
            unpack(file, folder / file.stem, pattern)
        except CheckpointError as error:
            if like:
                raise
            raise CheckpointError(
                f"{error} Or name a MODEL of the same configuration and tokenizer by --like."
            ) from error
        yield Stage("onnx graph")
        try:
            graph = float_graph(open_checkpoint(str(folder / file.stem)), folder / "graph")
        except CheckpointError as error:  # of the copy, which is gone when this is read
            raise CheckpointError(f"{file} cannot be converted, unpacked it is no good model: {error}") from error
        yield Stage("write", len(layouts))
        results = []
        for place in folders:
            layout = place.name.removeprefix(f"{file.stem}-")
            results.append(
                write_onnx(
                    graph, source, None, folder / place.name, format=file.stem, layout=layout, level=accuracy_level
                )
            )
        for place in folders:
            if place.is_dir():
                shutil.rmtree(place)
            (folder / place.name).replace(place)
        yield from results


def _check(source: GGUFFile) -> None:
    """Raises UsageError for tensors we cannot read, and where none is quantized."""
    for name, tensor in source.tensors.items():
        if tensor.type not in FORMATS:
            raise UsageError(f"{name} of {source.path} is {tensor.type}, which has no exact form in ONNX.")
        if name.endswith(".scale"):
            raise UsageError(
                f"{source.path} keeps {name} beside its blocks, which transformers does not read; "
                "have `quantize --artifact onnx` write both."
            )
    kinds = sorted({tensor.type for tensor in source.tensors.values()})
    if all(FORMATS[kind].is_float for kind in kinds):
        held = f"{' and '.join(kinds)} alone" if kinds else "no tensors"
        raise UsageError(
            f"{source.path} is not quantized: it holds {held}. Give a quantized file, or have "
            f"`quantize {source.path} --artifact onnx` quantize this one."
        )


_READ = (
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base",
    "rope.dimension_count", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
"""Settings that transformers reads out of a GGUF file of every architecture, or that follow from its shapes."""


def _check_configuration(source: GGUFFile) -> None:
    """Raises UsageError where the file says of its model what transformers does not read out of it: experts, windows,
    scaled positions."""
    own = f"{source.architecture}."
    odd = [name for name in source.reader.fields if name.startswith(own) and name.removeprefix(own) not in _READ]
    odd += [name for name in source.tensors if name.startswith("rope_")]
    if odd:
        raise UsageError(
            f"{source.path} has {odd[0]}, which transformers may not read out of a file; name a MODEL of the same "
            "configuration and tokenizer by --like."
        )
