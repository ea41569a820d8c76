"""Which tensor of the artifact gets which format, from which rows of which weight.

llama.cpp itself decides the types: `llama-quantize --dry-run` on the float file. So mixes, tied embeddings and
substitutes for rows that a block does not divide are upstream's, and the artifact is as large as `llama-quantize`'s to
the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from formats import FORMATS, BlockFormat
from qronos_export.errors import PlanError

if TYPE_CHECKING:
    from qronos_export.artifact.gguf import GGUFFile, RowIndex, StoredTensor, Target


class Plan:
    """Targets for weights, as they come by; and in the end, what no weight claimed."""

    def __init__(self, file: GGUFFile, index: RowIndex, types: Mapping[str, str]) -> None:
        self._file = file
        self._index = index
        self._types = types
        self._targets: dict[str, list[Target]] = {}

    def claim(self, weights: Mapping[str, Tensor]) -> None:
        """Find the tensors of the file that `weights` (parameter name -> float32 [rows, columns]) fill."""
        for target in self._index.match(weights):
            self._targets.setdefault(target.source, []).append(target)

    def targets(self, name: str) -> list[Target]:
        """Where rows of the weight `name` go; empty where it stays float."""
        return self._targets.get(name, [])

    def forget(self) -> None:
        """Drop the targets found so far; a block's are of no use once it is written."""
        self._targets.clear()

    def format(self, target: Target) -> BlockFormat:
        return FORMATS[self._types[target.tensor]]

    def tensor(self, target: Target) -> StoredTensor:
        return self._file.tensors[target.tensor]

    @property
    def unclaimed(self) -> list[str]:
        """Tensors meant to be quantized whose rows are no rows of ours: they stay float."""
        return self._index.unmatched


def quantized_names(file: GGUFFile, types: Mapping[str, str], format: str) -> list[str]:
    """The tensors of `file` whose planned type is a block format. Raises PlanError for a type we do not have."""
    names = []
    for name, tensor in file.tensors.items():
        planned = types.get(name)
        if planned is None:
            raise PlanError(f"llama-quantize's plan for {format} does not mention {name} of {file.path}.")
        if planned == tensor.type:
            continue
        if planned not in FORMATS:
            raise PlanError(
                f"{format} stores {name} as {planned}, which this version cannot write; "
                f"it has {', '.join(FORMATS)}. Choose a --format made of these."
            )
        FORMATS[planned].check(tensor.columns)
        names.append(name)
    if all(FORMATS[types[name]].is_float for name in names):
        columns = sorted({tensor.columns for tensor in file.tensors.values() if len(tensor.shape) > 1})
        raise PlanError(
            f"{format} would quantize nothing of this model: its rows of {', '.join(map(str, columns))} weights do not "
            f"divide into blocks of {FORMATS[format].block_size if format in FORMATS else 32}."
        )
    return names
