"""An artifact on its way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.plan import Mix, Plan


@dataclass(frozen=True)
class Output:
    """One artifact on its way: its types, its finished blocks, and where it will be."""

    mix: Mix
    store: BlockStore
    path: Path

    def bytes(self, source: GGUFFile) -> int:
        """What its tensors will take."""
        formats = {name: self.mix.format(name, tensor.columns) for name, tensor in source.tensors.items()}
        return sum(
            tensor.nbytes if (fmt := formats[name]) is None else tensor.rows * fmt.row_bytes(tensor.columns)
            for name, tensor in source.tensors.items()
        )

    def kept(self, source: GGUFFile, plan: Plan) -> list[dict[str, str]]:
        """Tensors of the mix that were not rounded after all, and why."""
        return [
            {
                "artifact": self.mix.name,
                "tensor": name,
                "type": source.tensors[name].type,
                "why": "its rows are no rows of a weight we calibrate"
                if name in plan.unclaimed
                else "the model never runs its layer as a linear one",
            }
            for name in self.mix.quantized
            if name not in self.store.formats
        ]

    def substitutes(self) -> list[dict[str, str]]:
        return [
            {"artifact": self.mix.name, "tensor": name, "wanted": wanted, "type": self.mix.types[name]}
            for name, wanted in self.mix.substitutes.items()
        ]
