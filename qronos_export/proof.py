"""How far a file is from its float model: what to measure on, and measuring what is there already."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qronos_export import corpus
from qronos_export.checkpoint import Checkpoint, open_checkpoint
from qronos_export.device import pick_device
from qronos_export.errors import UsageError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.onnx_validation import TorchReference, open_session
from qronos_export.validation import Cache, Reference, Validation

OUTTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Held:
    """Held-out text to validate on: `chunks` chunks of `context` tokens of `text` (None: a text that Python ships), and
    the types of the file's keys and values meanwhile, `k` and `v`, where they are not a recipe's."""

    text: Path | None = None
    context: int = 512
    chunks: int | None = 40
    cache: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Cache(**self.cache)  # refuses types there are not
        if self.context < 4 or (self.chunks is not None and self.chunks < 1):
            raise UsageError(
                f"Cannot validate on {self.chunks} --chunks of --context {self.context}: one chunk of 4 is the least."
            )


def reference(
    model: Path,
    text: Path,
    held: Held,
    llamacpp: LlamaCpp,
    folder: Path,
    cache: Cache,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The float file `model` on `text`, to compare others with."""
    return Reference(
        model, text, llamacpp=llamacpp, workspace=folder, context=held.context, chunks=held.chunks, cache=cache,
        on_chunk=on_progress,
    )  # fmt: skip


def prove_onnx(
    file: Path, original: str, held: Held, *, on_progress: Callable[[int, int], None] | None = None
) -> Validation:
    """Measure the ONNX model `file`, a .onnx or a folder with one, against its float model `original` in torch."""
    if held.cache:
        raise UsageError("--cache-type-k and -v are llama.cpp's; an ONNX model keeps keys and values in floats.")
    session = open_session(file)
    with tempfile.TemporaryDirectory(prefix="qronos-export-") as scratch:
        measured = TorchReference(
            open_checkpoint(original), held_out_file(held, Path(scratch)), device=pick_device("auto"),
            context=held.context, chunks=held.chunks,
        )  # fmt: skip
        return measured.compare(session, on_chunk=on_progress)


def prove(file: Path, original: str, held: Held, *, llamacpp: LlamaCpp) -> Validation:
    """Measure `file` against its float model `original`: a .gguf as it is, any other MODEL converted first."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give the quantized .gguf.")
    with tempfile.TemporaryDirectory(prefix="qronos-export-") as scratch:
        folder = Path(scratch)
        text = held_out_file(held, folder)
        model = Path(original)
        if model.suffix != ".gguf":
            model = float_file(open_checkpoint(original), llamacpp, folder)
        with reference(model, text, held, llamacpp, folder, Cache(**held.cache)) as against:
            return against.compare(file)


def float_file(checkpoint: Checkpoint, llamacpp: LlamaCpp, folder: Path) -> Path:
    """The checkpoint as upstream's converter writes it, in the dtype it is stored in; or the GGUF the user gave."""
    if checkpoint.float_gguf is not None:
        return checkpoint.float_gguf
    folder.mkdir(exist_ok=True)
    destination = folder / f"{checkpoint.name}-float.gguf"
    llamacpp.convert(checkpoint.folder, destination, float_type(checkpoint))
    return destination


def float_type(checkpoint: Checkpoint) -> str:
    """What the converter is told to write."""
    return OUTTYPES.get(checkpoint.dtype, "f32")


def held_out_file(held: Held, folder: Path) -> Path:
    """The text to validate on, as a file. Raises UsageError where the user's does not exist."""
    if held.text is not None:
        if not held.text.is_file():
            raise UsageError(f"--text {held.text} does not exist; give a text file in UTF-8, or leave it out.")
        return held.text
    path = folder / "held-out.txt"
    path.write_text(corpus.held_out_text(), encoding="utf-8")
    return path
