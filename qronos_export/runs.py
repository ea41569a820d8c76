"""Finished runs and measured baselines, read back, and which of their files may be compared."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.errors import ReportError
from qronos_export.report import Artifact, LayerReport, RunReport, read_report
from qronos_export.typed_json import load, typed
from qronos_export.validation import Validation

_SAME_MODEL = 0.01  # of the float model's perplexity: machines and runtimes differ by less, models by more
_OTHER = "metadata"


@dataclass(frozen=True)
class Stored:
    """Tensors of one kind ("attn_q") and type ("Q4_0") in a file; or what else it holds, of type "–"."""

    kind: str
    type: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Run:
    """A folder that `quantize` filled. `stored` has the GGUF files that lie in it still, by name."""

    name: str
    folder: Path
    report: RunReport
    stored: dict[str, list[Stored]]

    @property
    def model(self) -> str:
        return str(self.report.model["name"])

    def label(self, artifact: Artifact) -> str:
        """The artifact's name without the model's: Q4_0, Q4_0-onnx."""
        return artifact.path.removesuffix(".gguf").removeprefix(f"{self.model}-")


@dataclass(frozen=True)
class Measured:
    """One file that was compared with its float model. `run` is None for a baseline."""

    label: str
    run: str | None
    bytes: int
    bits: float
    validation: Validation


@dataclass
class Comparison:
    """Files of one model that were measured on the same tokens."""

    model: str
    files: list[Measured] = field(default_factory=list)

    def fits(self, other: Validation) -> bool:
        mine = self.files[0].validation
        return (mine.text_sha256, mine.context, mine.chunks) == (
            other.text_sha256, other.context, other.chunks,
        ) and math.isclose(mine.perplexity_reference, other.perplexity_reference, rel_tol=_SAME_MODEL)  # fmt: skip

    @property
    def frontier(self) -> list[Measured]:
        """Files that no other beats in bits and divergence, by bits."""
        best: list[Measured] = []
        for each in sorted(self.files, key=lambda file: (file.bits, file.validation.kl_divergence)):
            if not best or each.validation.kl_divergence < best[-1].validation.kl_divergence:
                best.append(each)
        return best


@dataclass(frozen=True)
class _Size:
    """What a baseline says of its file besides what `validate --json` prints."""

    name: str
    bytes: int
    bits: float


@dataclass(frozen=True)
class _Compared:
    """A file as `compare --json` prints it."""

    file: str
    bytes: int
    bits_per_weight: float
    validation: Validation


@dataclass(frozen=True)
class _Comparison:
    files: list[_Compared]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises ReportError for a folder without a run, or one whose files are not those of its report."""
    resolved = [folder.resolve() for folder in folders]
    if twice := next((f for i, f in enumerate(resolved) if f in resolved[:i]), None):
        raise ReportError(f"{twice} is given twice; name each folder once.")
    short = [folder.name for folder in resolved]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
    return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read_run(name: str, folder: Path) -> Run:
    path = folder / "report.json"
    if not path.is_file():
        raise ReportError(f"{folder} has no report.json; give a folder that `qronos-export quantize` wrote.")
    report = read_report(path)
    if not isinstance(report.model.get("name"), str):
        raise ReportError(f"{path}: model has no name; it is damaged, or was written by another version.")
    stored = {}
    for artifact in report.artifacts:
        file = folder / artifact.path
        if Path(artifact.path).name != artifact.path:
            raise ReportError(f"{path} names an artifact {artifact.path!r}; expected a file or folder beside it.")
        if artifact.path.endswith(".gguf") and file.is_file():
            if (found := file.stat().st_size) != artifact.bytes:
                raise ReportError(
                    f"{file} has {found} bytes and its report.json says {artifact.bytes}: it is another file, or not "
                    "whole. Quantize again, or move it away to report without it."
                )
            stored[artifact.path] = stored_tensors(file)
    return Run(name, folder, report, stored)


def stored_tensors(file: Path) -> list[Stored]:
    """Where the bytes of a GGUF file are, the largest part first; they add up to its size."""
    parts: dict[tuple[str, str], list[int]] = {}
    for tensor in GGUFFile(file).tensors.values():
        part = parts.setdefault((kind_of(tensor.name), tensor.type), [0, 0, 0])
        for place, more in enumerate((1, tensor.rows * tensor.columns, tensor.nbytes)):
            part[place] += more
    found = [Stored(kind, type, *part) for (kind, type), part in parts.items()]
    found.append(Stored(_OTHER, "–", 0, 0, file.stat().st_size - sum(each.bytes for each in found)))
    return sorted(found, key=lambda each: -each.bytes)


def kind_of(tensor: str) -> str:
    """What a tensor is, whichever block it is in: blk.3.attn_q.weight is attn_q, token_embd.weight token_embd."""
    return re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight")


def block_of(tensor: str) -> int | None:
    """The number of the block it is in."""
    found = re.match(r"blk\.(\d{1,6})\.", tensor)
    return None if found is None else int(found[1])


def read_baselines(path: Path, runs: Sequence[Run]) -> list[Measured]:
    """A file as `read_baseline` takes it, or what `compare --json` prints, without the files of `runs` themselves.

    Raises ReportError as that does.
    """
    data = load(path)
    if not isinstance(data, dict) or "files" not in data:
        return [read_baseline(path)]
    own = {(artifact.path, artifact.bytes) for run in runs for artifact in run.report.artifacts}
    found = typed(_Comparison, data, str(path)).files
    return [
        Measured(each.file, None, each.bytes, each.bits_per_weight, each.validation)
        for each in found
        if (Path(each.file).name, each.bytes) not in own
    ]


def read_baseline(path: Path) -> Measured:
    """A file holding what `validate --json` prints, with name, bytes and bits (a weight) beside it.

    Raises ReportError where one of them is missing or is no such number.
    """
    data = load(path)
    size = typed(_Size, data, str(path))
    if size.bytes <= 0 or size.bits <= 0:
        raise ReportError(f"{path}: bytes is {size.bytes} and bits {size.bits:g}; expected numbers above 0.")
    return Measured(size.name, None, size.bytes, size.bits, typed(Validation, data, str(path)))


def compare(runs: Sequence[Run], baselines: Iterable[tuple[Path, Measured]]) -> list[Comparison]:
    """What the runs measured, in as many groups as there are models and texts; each baseline with its own.

    Raises ReportError for a baseline that was measured on other tokens or another model than every run.
    """
    found: list[Comparison] = []
    for run in runs:
        for artifact in run.report.artifacts:
            if artifact.validation is None:
                continue
            where = f"{run.folder / 'report.json'}: {artifact.path}: validation"
            checked = typed(Validation, artifact.validation, where)
            place = next((each for each in found if each.model == run.model and each.fits(checked)), None)
            if place is None:
                found.append(place := Comparison(run.model))
            label = run.label(artifact)
            place.files.append(Measured(label, run.name, artifact.bytes, artifact.bits_per_weight, checked))
    for path, baseline in baselines:
        fitting = [each for each in found if each.fits(baseline.validation)]
        if not fitting:
            theirs = baseline.validation
            raise ReportError(
                f"{path} was measured on {theirs.chunks} chunks of {theirs.context} tokens of the text "
                f"{theirs.text_sha256:.12}…, float model's perplexity {theirs.perplexity_reference:.4f}; no run was: "
                + "; ".join(
                    f"{v.chunks} of {v.context}, {v.text_sha256:.12}…, {v.perplexity_reference:.4f}"
                    for v in (each.files[0].validation for each in found)
                )
                + ("." if found else "none was validated.")
                + " Measure it with the same --text, --context and --chunks."
            )
        for each in fitting:
            each.files.append(baseline)
    return found


def layer_kinds(layers: Iterable[LayerReport]) -> list[str]:
    """The kinds of tensor there are, in the order of a block."""
    return list(dict.fromkeys(kind_of(layer.tensor) for layer in layers))


def printable(text: str) -> str:
    """`text` on one line: ↵ for a line's end, ⇥ for a tab, � for other control characters and halves of characters."""
    return "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text.replace("\n", "↵").replace("\t", "⇥")
    )
