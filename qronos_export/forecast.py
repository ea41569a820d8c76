"""What a run would write, hold, compute and take, without running it.

Types come from llama-quantize on a file whose weights are holes; sizes from the header that would be written. Memory is
a list of moments, each a sum of named terms, and the largest counts; what the terms are made of is found by running one
block without weights (survey.py) and rounding small matrices (rehearsal.py). docs/forecast.md has the formulas.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from formats import BlockFormat
from qronos_export.artifact.gguf import GGUFFile, extend, names_of
from qronos_export.artifact.gguf_write import written_bytes
from qronos_export.budget import Budget, Job
from qronos_export.checkpoint import Checkpoint, HollowModel, hollow_folder, open_checkpoint
from qronos_export.choice import choose_types
from qronos_export.device import pick_device
from qronos_export.llamacpp import LlamaCpp
from qronos_export.memory import give_back, resident_memory
from qronos_export.output import Output
from qronos_export.plan import Mix, is_foreign
from qronos_export.preconditions import check_recipe
from qronos_export.proof import float_type
from qronos_export.provenance import file_facts, model_facts
from qronos_export.recipe import Recipe
from qronos_export.rehearsal import Machine, measure
from qronos_export.resolved import matched, replayable
from qronos_export.survey import Survey, survey
from qronos_export.transformed import need_inputs
from qronos_export.transforms import TRANSFORMS, Goal
from qronos_export.workspace import float_bytes


@dataclass(frozen=True)
class File:
    """A GGUF file of the run: its types, its size to the byte, and what was not stored as wished. Of a type that GGUF
    lacks its blocks alone."""

    name: str
    format: str
    bytes: int
    bits_per_weight: float
    types: dict[str, str]
    substitutes: list[dict[str, str]]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(self.types.values()).most_common())


@dataclass(frozen=True)
class Forecast:
    """memory: moment of the run -> term -> bytes; the largest sum is `peak_memory_bytes`.
    flops:   of forwards, statistics and rounding; a product and a sum are two.
    disk:    what is needed at most in the output folder, by what for.
    seconds: expected, by phase, as in a report."""

    model: str
    files: list[File]
    memory: dict[str, dict[str, int]]
    flops: dict[str, float]
    disk: dict[str, int]
    seconds: dict[str, float]
    machine: Machine
    notes: list[str] = field(default_factory=list)

    @property
    def moment(self) -> str:
        """When memory is at its peak."""
        return max(self.memory, key=lambda each: sum(self.memory[each].values()))

    @property
    def peak_memory_bytes(self) -> int:
        return sum(self.memory[self.moment].values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "peak_memory_bytes": self.peak_memory_bytes,
            "moment": self.moment,
            "disk_bytes": sum(self.disk.values()),
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
        }


def forecast(recipe: Recipe, llamacpp: LlamaCpp) -> Forecast:
    """Of `pipeline.run` without validation. Raises QronosError where that would before anything is computed."""
    check_recipe(recipe, None, llamacpp)
    device = pick_device(recipe.device)
    checkpoint = open_checkpoint(recipe.model)
    recipe = matched(recipe, checkpoint)
    with tempfile.TemporaryDirectory(prefix="qronos-export-") as scratch:
        folder = Path(scratch)
        begun = time.perf_counter()
        source = _hollow_file(checkpoint, recipe, llamacpp, folder)
        converted = time.perf_counter() - begun
        mixes = [choose_types(source, name, recipe, llamacpp) for name in recipe.formats]
        files = [_file(checkpoint, source, each, folder / "header", recipe, device) for each in mixes]
        model = HollowModel(checkpoint)
        types = [
            _Types(source, each, [name for name, p in model.model.named_parameters() if p.ndim == 2]) for each in mixes
        ]
        seen = _survey(model, types, recipe)
        del model
        give_back()
        interpreter = resident_memory()
        machine = measure(folder, device)
        jobs = [[each.jobs(block, seen) for each in types] for block in range(len(seen.blocks))]
        outer = [each.outer(seen) for each in types]
        budget = Budget(recipe, checkpoint, seen, jobs, outer, machine, device)
        return Forecast(
            checkpoint.name,
            files,
            {moment: {"interpreter": interpreter, **terms} for moment, terms in budget.memory().items()},
            budget.flops(),
            budget.disk(sum(each.bytes for each in files)),
            budget.seconds(sum(each.bytes for each in files), converted),
            machine,
            budget.notes(),
        )


def _hollow_file(checkpoint: Checkpoint, recipe: Recipe, llamacpp: LlamaCpp, folder: Path) -> GGUFFile:
    """The float file whose tensors will be quantized, with a hole for the weights."""
    names = recipe.transform_names
    if not names and checkpoint.float_gguf is not None:
        return GGUFFile(checkpoint.float_gguf)
    untied = any(TRANSFORMS[name](Goal("Q4_0", 0)).unties for name in names)
    hollow = hollow_folder(checkpoint, folder / "hollow", transformed=bool(names), untied=untied)
    path = folder / f"{checkpoint.name}-float.gguf"
    llamacpp.convert_header(hollow, path, "f32" if names else float_type(checkpoint))
    return extend(path, 4 * float_bytes(checkpoint))


def _file(
    checkpoint: Checkpoint, source: GGUFFile, mix: Mix, scratch: Path, recipe: Recipe, device: torch.device
) -> File:
    weights = sum(tensor.rows * tensor.columns for tensor in source.tensors.values())
    stored = Output(mix, None, scratch).bytes(source)  # type: ignore[arg-type]  # nothing is stored
    name, size = f"{checkpoint.name}-{mix.name}, its blocks", stored
    if not any(map(is_foreign, mix.types.values())):
        facts = file_facts(
            source,
            {
                **replayable(recipe, checkpoint, device).to_json(),
                "transforms": ",".join(recipe.transform_names) or "none",
            },
            mix.name,
            model_facts(checkpoint, source)[0],
            {"sha256": 64 * "0", "tokens": recipe.samples * recipe.sequence_length}  # a hash like any other
            if recipe.method != "rtn" or need_inputs(recipe.transform_names)
            else None,
        )
        name = f"{checkpoint.name}-{mix.name}.gguf"
        size = written_bytes(source, _formats(source, mix), mix.file_type, scratch, facts)
    return File(
        name,
        mix.name,
        size,
        8 * stored / weights,
        dict(mix.types),
        [{"tensor": tensor, "wanted": wanted, "type": mix.types[tensor]} for tensor, wanted in mix.substitutes.items()],
    )


def _formats(source: GGUFFile, mix: Mix) -> dict[str, BlockFormat]:
    found = {name: mix.format(name, source.tensors[name].columns) for name in mix.quantized}
    return {name: fmt for name, fmt in found.items() if fmt is not None}


class _Types:
    """Which type a weight of the model gets, as far as names and shapes tell."""

    def __init__(self, source: GGUFFile, mix: Mix, weights: Sequence[str]) -> None:
        self._source, self._formats = source, _formats(source, mix)
        self._names = names_of(source, weights)

    def of(self, block: int, weight: str, shape: tuple[int, int]) -> BlockFormat | None:
        """By upstream's list of names; else kept where a tensor of the block that is kept has this shape; else as most
        of the block's tensors with rows as long."""
        if (name := self._names.get(weight)) is not None:
            return self._formats.get(name)
        inside = [t for t in self._source.tensors.values() if t.name.startswith(f"blk.{block}.")]
        if any((t.rows, t.columns) == shape and t.name not in self._formats for t in inside):
            return None
        like = [self._formats[t.name] for t in inside if t.columns == shape[1] and t.name in self._formats]
        return Counter(like).most_common(1)[0][0] if like else None

    def jobs(self, block: int, seen: Survey) -> list[list[Job]]:
        """For each place of a block, what is rounded together: rows of one type, or one expert's."""
        found = []
        for place in seen.blocks[block].places:
            rows: Counter[BlockFormat] = Counter()
            heads: dict[BlockFormat, tuple[int, int]] = {}
            for part, shape in place.matrices.items():
                if fmt := self.of(block, f"{seen.block_names[block]}.{part}", shape):
                    rows[fmt] = max(rows[fmt], shape[0]) if place.experts else rows[fmt] + shape[0]
                    if each := seen.blocks[block].heads.get(part):
                        heads[fmt] = heads.get(fmt, (0, 0))[0] + each[0], each[1]
            count = max(1, place.experts)
            found.append([Job(fmt, n, place.columns, count, heads.get(fmt)) for fmt, n in rows.items()])
        return found

    def outer(self, seen: Survey) -> tuple[Job | None, Job | None]:
        """The embedding, and a head of its own."""
        found = []
        for tensor, there in (("token_embd.weight", True), ("output.weight", seen.head and not seen.tied)):
            fmt = self._formats.get(tensor) if there else None
            found.append(Job(fmt, seen.vocabulary, seen.hidden) if fmt else None)
        return found[0], found[1]


def _survey(model: HollowModel, types: Sequence[_Types], recipe: Recipe) -> Survey:
    return survey(
        model,
        lambda block, weight, shape: any(each.of(block, weight, shape) for each in types),
        min(recipe.micro_batch, recipe.samples),
        recipe.sequence_length,
    )
