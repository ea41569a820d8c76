"""What an inspection finds, whatever the file: facts that were read, and what is wrong with them.

Names and texts are the file's own and may hold anything; whoever prints them asks `shown` first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qronos_export.inspection.numbers import Statistics

ERROR, WARNING, NOTE = "error", "warning", "note"


def shown(text: str) -> str:
    """`text` for a terminal: whatever is no visible character (escapes, line ends, directions) as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Finding:
    """Something wrong, or a limit of the check. An error means that runtimes refuse the file or compute nonsense."""

    severity: str
    where: str  # a tensor, a key, a place in the file
    what: str


@dataclass(frozen=True)
class Entry:
    """A value of the metadata. With a `count`, `value` holds the first of so many entries, or of a string's bytes."""

    kind: str
    value: Any
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        if self.count is None:
            return {"type": self.kind, "value": plain(self.value)}
        return {"type": self.kind, "count": self.count, "first": plain(self.value)}


@dataclass(frozen=True)
class TensorFacts:
    """A tensor as the file describes it. `bytes` is None where the type's size is unknown; what is `shared` has its
    bytes under another name, too."""

    name: str
    type: str
    shape: tuple[int, ...]  # last is the row length
    weights: int
    bytes: int | None
    statistics: Statistics | None = None
    shared: bool = False

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.bytes / self.weights if self.bytes is not None and self.weights else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "weights": self.weights,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "statistics": None if self.statistics is None else self.statistics.to_json(),
        }


@dataclass(frozen=True)
class TypeFacts:
    """The tensors of a type together."""

    type: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass
class Inspection:
    """A file's content. `findings` are complete only where the file was checked."""

    path: Path
    format: str
    bytes: int
    metadata: Mapping[str, Entry]
    tokenizer: Mapping[str, Any]
    chat_templates: Mapping[str, str]
    tensors: Sequence[TensorFacts]
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == ERROR]

    @property
    def types(self) -> list[TypeFacts]:
        """By type, the one with the most bytes first."""
        sums: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            count, weights, size = sums.get(tensor.type, (0, 0, 0))
            own = (0, 0) if tensor.shared else (tensor.weights, tensor.bytes or 0)
            sums[tensor.type] = count + 1, weights + own[0], size + own[1]
        return sorted((TypeFacts(name, *each) for name, each in sums.items()), key=lambda each: -each.bytes)

    @property
    def total(self) -> TypeFacts:
        types = self.types
        tensors, weights, size = (
            sum(getattr(each, name) for each in types) for name in ("tensors", "weights", "bytes")
        )
        return TypeFacts("all", tensors, weights, size)

    def to_json(self, *, checked: bool) -> dict[str, Any]:
        """For json.dumps, without NaN and infinities. `findings` is null unless the file was checked."""

        def of(each: TypeFacts) -> dict[str, Any]:
            sizes = {"tensors": each.tensors, "weights": each.weights, "bytes": each.bytes}
            return {"type": each.type, **sizes, "bits_per_weight": each.bits_per_weight}

        return {
            "file": str(self.path),
            "format": self.format,
            "bytes": self.bytes,
            "metadata": {key: entry.to_json() for key, entry in self.metadata.items()},
            "tokenizer": plain(dict(self.tokenizer)),
            "chat_templates": dict(self.chat_templates),
            "types": [of(each) for each in self.types],
            "total": {key: value for key, value in of(self.total).items() if key != "type"},
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "findings": [vars(finding) for finding in self.findings] if checked else None,
        }


def plain(value: Any) -> Any:
    """`value` with floats that JSON does not have as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
