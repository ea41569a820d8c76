"""Several quantized files of one model side by side: size, quality on the same chunks, speed.

GGUF files run in llama.cpp against its float model, ONNX models in onnxruntime against torch's. Text, chunks and scored
tokens are the same, so files of both kinds are paired chunk by chunk.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.checkpoint import open_checkpoint
from qronos_export.device import pick_device
from qronos_export.errors import UsageError
from qronos_export.events import Stage
from qronos_export.llamacpp import LlamaCpp
from qronos_export.onnx_validation import TorchReference, open_session
from qronos_export.paired import LEVEL, Chunks, Difference, adjusted, difference
from qronos_export.proof import Held, float_file, held_out_file, reference
from qronos_export.validation import Cache, Validation

PROMPT, NEW, ROUNDS = 256, 64, 5  # tokens read, tokens written one by one, and how often


@dataclass(frozen=True)
class Rate:
    """Tokens per second, the mean of ROUNDS and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Compared:
    """One file. `bits_per_weight` are stored bits of all tensors; rates are None where they were not measured."""

    file: str
    bytes: int
    bits_per_weight: float
    validation: Validation
    prompt: Rate | None = None
    generation: Rate | None = None

    @property
    def per_chunk(self) -> Chunks:
        assert self.validation.per_chunk is not None  # of all that we measure ourselves
        return self.validation.per_chunk

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """What `a` has more than `b` on the same chunks: nats of divergence and of loss, percent of same top tokens; each
    with its p adjusted for all pairs of the comparison."""

    a: str
    b: str
    kl_divergence: Difference
    loss: Difference
    same_top: Difference

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    files: Sequence[Path],
    original: str,
    held: Held,
    *,
    find: Callable[[], LlamaCpp],
    speed: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Stage | Compared]:
    """Measure `files`, .gguf or ONNX models, against their float model `original`, in their order.

    `find` is asked for llama.cpp where a file needs it; `on_progress` is told chunks done and in all. Raises UsageError
    for files that are missing or given twice, ArtifactError for those that cannot be opened, before any model runs.
    """
    names = _names(files)
    if held.chunks is not None and held.chunks < 2:
        raise UsageError("Files are compared chunk by chunk; give at least two --chunks.")
    onnx = {file for file in files if file.suffix == ".onnx" or file.is_dir()}
    if onnx:
        check_packages()
    for file in files:
        if file in onnx:
            open_session(file)
        else:
            GGUFFile(file)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qronos-export-")))
        text = held_out_file(held, scratch)
        if len(onnx) < len(files):
            yield Stage("float model in llama.cpp")
            tools = find()
            tools = replace(tools, threads=tools.threads or _cores())
            model = Path(original)
            if model.suffix != ".gguf":
                model = float_file(open_checkpoint(original), tools, scratch)
            theirs = stack.enter_context(reference(model, text, held, tools, scratch, Cache(), on_progress))
        if onnx:
            yield Stage("float model in torch")
            torchs = TorchReference(
                open_checkpoint(original), text, device=pick_device("auto"), context=held.context, chunks=held.chunks
            )
        for file, name in zip(files, names, strict=True):
            yield Stage(f"measure {name}")
            if file in onnx:
                session = open_session(file)
                # Data beside the graph, model.onnx.data or model.onnx_data; of small models it may lie within.
                beside = [each for each in session.path.parent.glob(f"{session.path.name}*") if each != session.path]
                stored = sum(each.stat().st_size for each in beside or [session.path])
                bits = 8 * stored / torchs.weights
                measured = Compared(name, _bytes(file), bits, torchs.compare(session, on_chunk=on_progress))
                folder = session.path.parent
                del session
                if speed and (folder / "genai_config.json").is_file():
                    yield Stage(f"speed of {name}")
                    measured = _with_rates(measured, *_genai_rates(folder))
            else:
                found = theirs.compare(file, on_chunk=on_progress)
                measured = Compared(name, file.stat().st_size, GGUFFile(file).bits_per_weight, found)
                if speed:
                    yield Stage(f"speed of {name}")
                    measured = _with_rates(measured, *tools.rates(file, prompt=PROMPT, new=NEW, rounds=ROUNDS))
            yield measured


def pairs(files: Sequence[Compared]) -> list[Pair]:
    """Every two of `files`, on the chunks both read."""
    both = list(combinations(files, 2))
    columns = []
    for name in ("kl_divergence", "loss", "same_top"):
        found = [difference(getattr(a.per_chunk, name), getattr(b.per_chunk, name)) for a, b in both]
        columns.append([replace(each, p=p) for each, p in zip(found, adjusted([e.p for e in found]), strict=True)])
    return [Pair(a.file, b.file, *each) for (a, b), *each in zip(both, *columns, strict=True)]


def sentences(files: Sequence[Compared], found: Sequence[Pair]) -> list[str]:
    """What can be said of each file and the next worse one, by KL divergence."""
    known = {(pair.a, pair.b): pair.kl_divergence for pair in found}
    said = []
    for a, b in pairwise(sorted(files, key=lambda each: each.validation.kl_divergence)):
        apart = known.get((a.file, b.file)) or known[b.file, a.file]
        by = f"KL divergence {abs(apart.mean):.5f} ± {apart.error:.5f} apart, p {_p(apart.p)}"
        if apart.p < LEVEL:
            said.append(f"{a.file} is better than {b.file}: {by}.")
        else:
            said.append(f"{a.file} and {b.file} cannot be told apart on these chunks: {by}.")
    return said


def _p(p: float) -> str:
    return "< 0.001" if p < 1e-3 else f"= {p:.3f}"


def _names(files: Sequence[Path]) -> list[str]:
    """Of each file its name, or its path where two have one name."""
    for file in files:
        if not file.exists():
            raise UsageError(f"{file} does not exist; give quantized .gguf files, or ONNX models or folders.")
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError("A file is given twice; give each once.")
    short = [file.name for file in files]
    return [file.name if short.count(file.name) == 1 else str(file) for file in files]


def _bytes(model: Path) -> int:
    """Of an ONNX model: all of its folder, or the graph and its data."""
    parts = model.rglob("*") if model.is_dir() else model.parent.glob(f"{model.name}*")
    return sum(each.stat().st_size for each in parts if each.is_file())


def _with_rates(measured: Compared, prompts: Sequence[float], tokens: Sequence[float]) -> Compared:
    prompt, generation = (Rate(fmean(each), stdev(each) / math.sqrt(len(each))) for each in (prompts, tokens))
    return replace(measured, prompt=prompt, generation=generation)


def _genai_rates(folder: Path) -> tuple[list[float], list[float]]:
    from qronos_export.artifact.onnx_speed import random_tokens, rates

    tokens = random_tokens(folder, PROMPT)
    rates(folder, tokens, NEW, _cores())  # the first is slower, as llama-bench has it too
    both = [rates(folder, tokens, NEW, _cores()) for _ in range(ROUNDS)]
    return [reading for reading, _ in both], [writing for _, writing in both]


def _cores() -> int:
    """That this process may use, which in a container can be fewer than the machine's; macOS cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
