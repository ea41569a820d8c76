"""Which tensor of the artifact gets which format, from which rows of which weight.

llama.cpp itself decides the types: `llama-quantize --dry-run` on the float file, with the user's overrides. So mixes,
tied embeddings and substitutes for rows that a block does not divide are upstream's, and the tensors are as large as
`llama-quantize`'s to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor

from formats import FORMATS, BlockFormat, FormatError, find_format
from qronos_export.errors import PlanError, UsageError

if TYPE_CHECKING:
    from qronos_export.artifact.gguf import GGUFFile, StoredTensor, Target
    from qronos_export.artifact.gguf_rows import RowIndex
    from qronos_export.recipe import Recipe

CARRIERS = {"MXFP4": ("Q4_0", 38), "NVFP4": ("Q4_0", 39)}
"""Types that llama-quantize has no mix of for dense models: the mix whose plain type they replace, and the number that
`general.file_type` says them by (llama.h: MOSTLY_MXFP4_MOE, MOSTLY_NVFP4)."""
FOREIGN = ("Q4_0", 0)
"""The same for types that no GGUF file holds."""


@dataclass(frozen=True)
class Mix:
    """The types of one artifact.

    name:         as the user asked for it: a type or a mix by llama.cpp's name.
    file_type:    llama.cpp's number of it.
    types:        tensor -> type, of every tensor of the file.
    quantized:    the tensors whose type changes, in file order.
    substitutes:  tensor -> the type that was meant, where its blocks do not divide the tensor's rows.
    """

    name: str
    file_type: int
    types: Mapping[str, str]
    quantized: Sequence[str]
    substitutes: Mapping[str, str]

    def format(self, tensor: str, columns: int) -> BlockFormat | None:
        """What `tensor`, with rows of `columns` weights, is rounded to; None where it stays as it is."""
        return find_format(self.types[tensor], columns) if tensor in self.quantized else None


def mix(
    file: GGUFFile,
    name: str,
    file_type: int,
    types: Mapping[str, str],
    substitutes: Mapping[str, str],
    wished: Callable[[str], bool],
) -> Mix:
    """The mix `name` of `file` from llama-quantize's plan for it (or for its carrier).

    wished: whether the user gave a tensor its type.
    Raises PlanError for a type we do not have and where nothing would be quantized.
    """
    types, substitutes = dict(types), dict(substitutes)
    if name in CARRIERS or is_foreign(name):
        carrier, _ = CARRIERS.get(name, FOREIGN)
        substitutes = {t: name if meant == carrier and not wished(t) else meant for t, meant in substitutes.items()}
        for tensor in [t for t, planned in types.items() if planned == carrier]:
            if wished(tensor) or tensor in substitutes:
                continue
            columns = file.tensors[tensor].columns
            if columns % find_format(name, columns).block_size:
                substitutes[tensor] = name
            else:
                types[tensor] = name
    quantized = _quantized(file, types, name)
    return Mix(name, file_type, types, quantized, {t: meant for t, meant in substitutes.items() if t in quantized})


def _quantized(file: GGUFFile, types: Mapping[str, str], format: str) -> list[str]:
    names = []
    for name, tensor in file.tensors.items():
        planned = types.get(name)
        if planned is None:
            raise PlanError(f"llama-quantize's plan for {format} does not mention {name} of {file.path}.")
        if planned == tensor.type:
            continue
        if planned not in FORMATS and not is_foreign(planned):
            raise PlanError(
                f"{format} stores {name} as {planned}, which this version cannot write; "
                f"it has {', '.join(_storable())}. Choose a --format made of these, or an --override for this tensor."
            )
        block_size = find_format(planned, tensor.columns).block_size
        if tensor.columns % block_size:
            raise PlanError(
                f"{name} cannot be {planned}: its rows of {tensor.columns} weights do not divide into blocks of "
                f"{block_size}. Choose a type with smaller blocks for it."
            )
        names.append(name)
    if format in FORMATS and FORMATS[format].is_float:
        raise PlanError(f"{format} is a float type; choose a --format that quantizes, see `qronos-export formats`.")
    if all(types[name] in FORMATS and FORMATS[types[name]].is_float for name in names):
        columns = sorted({tensor.columns for tensor in file.tensors.values() if len(tensor.shape) > 1})
        raise PlanError(
            f"{format} would quantize nothing of this model: its rows of {', '.join(map(str, columns))} weights do not "
            f"divide into blocks of {FORMATS[format].block_size if format in FORMATS else 32}."
        )
    return names


def type_patterns(file: GGUFFile, overrides: Mapping[str, str]) -> dict[str, str]:
    """Overrides, glob of tensor names -> type (the first that fits counts), as `llama-quantize --tensor-type` has them.

    Raises UsageError for a glob that fits no tensor.
    """
    patterns = {}
    for glob, kind in overrides.items():
        if not any(fnmatchcase(name, glob) for name in file.tensors):
            some = [name for name, tensor in file.tensors.items() if len(tensor.shape) > 1][:3]
            raise UsageError(
                f"Override {glob}={kind} fits no tensor of {file.path.name}, which has {', '.join(some)} and so on; "
                "* stands for any characters, ? for any one."
            )
        patterns["^" + glob.replace(".", r"\.").replace("*", ".*").replace("?", ".") + "$"] = kind.lower()
    return patterns


def check_types(recipe: Recipe) -> None:
    """Raises UsageError for types that do not exist and for globs that cannot be; needs no model."""
    wishes = {f"Override {glob}={kind}": kind for glob, kind in recipe.overrides.items()}
    wishes |= {"--output-type": recipe.output_type or "F32", "--embedding-type": recipe.embedding_type or "F32"}
    for where, kind in wishes.items():
        if kind.upper() not in _storable():
            raise UsageError(f"{where}: there is no type {kind}; known are {', '.join(_storable())}.")
    for glob in recipe.overrides:
        if odd := re.search(r"[^\w.*?-]", glob):
            raise UsageError(
                f"Override {glob}: {odd.group()!r} cannot be in the glob of a tensor; * stands for any characters, "
                "? for any one."
            )


def check_overrides(mix: Mix, overrides: Mapping[str, str]) -> None:
    """Raises PlanError for an override that gives no tensor its type."""
    first = {tensor: next((g for g in overrides if fnmatchcase(tensor, g)), None) for tensor in mix.types}
    for glob, kind in overrides.items():
        taken = [tensor for tensor, by in first.items() if by == glob]
        if any(tensor in mix.substitutes or mix.types[tensor] == kind.upper() for tensor in taken):
            continue
        why = (
            f"llama.cpp keeps {taken[0]} as {mix.types[taken[0]]}: small tensors stay float, and --output-type and "
            "--embedding-type go first"
            if taken
            else "overrides before it take all tensors that it fits"
        )
        raise PlanError(f"Override {glob}={kind} would change nothing of {mix.name}: {why}.")


def is_foreign(name: str) -> bool:
    """Whether `name` is a type of ours that no GGUF file can hold, such as INT4_G128 or MXINT8."""
    try:
        return find_format(name, 256).ggml_type is None
    except FormatError:
        return False


def _storable() -> list[str]:
    return [name for name, fmt in FORMATS.items() if fmt.ggml_type is not None]


class Plan:
    """Targets for weights, as they come by; and in the end, what no weight claimed."""

    def __init__(self, file: GGUFFile, index: RowIndex) -> None:
        self._file = file
        self._index = index
        self._targets: dict[str, list[Target]] = {}

    def claim(self, weights: Mapping[str, Tensor]) -> None:
        """Find the tensors of the file that `weights` (parameter name -> float32 [rows, columns]) fill."""
        for target in self._index.match(weights):
            self._targets.setdefault(target.source, []).append(target)

    def targets(self, name: str) -> list[Target]:
        """Where rows of the weight `name` go; empty where it stays float in every artifact."""
        return self._targets.get(name, [])

    def forget(self) -> None:
        """Drop the targets found so far; a block's are of no use once it is written."""
        self._targets.clear()

    def leave(self, unclaimed: list[str]) -> None:
        """Only these tensors are left to be claimed: an earlier process has rounded the others."""
        self._index.leave(unclaimed)

    def tensor(self, target: Target) -> StoredTensor:
        return self._file.tensors[target.tensor]

    def may_have_scale(self, tensor: str) -> bool:
        """Whether the artifact can keep a scale of its own beside `tensor`."""
        return self._file.may_have_scale(self._file.tensors[tensor])

    @property
    def unclaimed(self) -> list[str]:
        """Tensors meant to be quantized whose rows are no rows of ours: they stay float."""
        return self._index.unmatched
