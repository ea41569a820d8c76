"""Every weight of a model rounded, block by block, in one walk of the float stream and of all quantized ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from qronos_export import calibration, precision
from qronos_export.activations import Activation, activation
from qronos_export.artifact import gguf
from qronos_export.attention import Attention, read_attention
from qronos_export.calibration import Clock, Group, Matrix
from qronos_export.checkpoint import LazyModel, head_sizes, round_cache
from qronos_export.decoder import Decoder, MicroBatch, add_stream, enter
from qronos_export.kv_cache import KVCache
from qronos_export.layers import Destinations, Store, round_groups
from qronos_export.memory import give_back
from qronos_export.plan import Mix
from qronos_export.ranks import ALONE, Ranks
from qronos_export.recipe import Recipe
from qronos_export.report import LayerReport
from qronos_export.rounding import ROUNDERS, Rounder, Settings, blind
from qronos_export.states import Shelf
from qronos_export.statistics import LayerStats

Stored = Callable[[int, gguf.StoredTensor, torch.Tensor], torch.Tensor]


@dataclass
class Passengers:
    """Sequences `tokens` int64 [n, length] that ride along in all streams and that nothing is learned from. Afterwards
    `batches` hold what the last block returned, and `heads` each quantized stream's output matrix [vocabulary, hidden].
    """

    tokens: torch.Tensor
    batches: list[MicroBatch] = field(default_factory=list)
    heads: list[torch.Tensor] = field(default_factory=list)


class Sink(Protocol):
    """What takes the blocks of one quantized stream: an Output, or what stands for one."""

    @property
    def mix(self) -> Mix: ...

    @property
    def store(self) -> Store: ...


class Journal(Protocol):
    """Keeps each step of a walk once it is finished: the embedding, a block, the head. `done` of them were before; of
    these, what was rounded in the `torn` ones is lost."""

    done: int
    torn: list[int]

    def mended(self, step: int) -> None: ...

    def values(self, stream: int, tensor: gguf.StoredTensor, file_rows: torch.Tensor) -> torch.Tensor: ...

    def restore(self, batches: Sequence[MicroBatch]) -> None: ...

    def save(self, batches: Sequence[MicroBatch]) -> None: ...


class Walk:
    """All streams side by side on their way through `model`: the embedding, every block, the head. Each of `ranks` runs
    its share of `tokens` int64 [n, length], and may leave hidden states in files of `folder`.

    Methods yield each tensor as it is rounded. Given `stored`, (stream, tensor, rows of it) -> values, the matrices
    become these instead, as they were rounded once before, and nothing is learned on the way.
    """

    def __init__(
        self,
        model: LazyModel,
        plan: Destinations,
        outputs: Sequence[Sink],
        tokens: torch.Tensor,
        recipe: Recipe,
        clock: Clock,
        passengers: Passengers | None = None,
        ranks: Ranks = ALONE,
        folder: Path | None = None,
    ) -> None:
        self.model, self.batches, self._clock = model, list[MicroBatch](), clock
        self._plan, self._outputs, self._recipe = plan, outputs, recipe
        self._ranks, self._passengers = ranks, passengers
        self._rounder, self._settings = rounder_settings(recipe)
        self._decoder = decoder = Decoder(model.model.get_decoder(), model.blocks)
        self._runtime = _runtime(model, plan, outputs, recipe)
        self._linear = precision.linear(recipe.compute_dtype)
        shelf = Shelf(recipe.offload, torch.bfloat16 if recipe.state_dtype == "bfloat16" else None, folder)

        clock.lap(None)
        apart = held_out(len(tokens), recipe.holds_out_one_in)
        self.batches += enter(decoder, ranks.share(tokens[~apart], recipe.micro_batch), shelf=shelf)
        if bool(apart.any()):
            self.batches += enter(decoder, ranks.share(tokens[apart], recipe.micro_batch), held=True, shelf=shelf)
        self._counted = list(self.batches)
        (self._probe,) = enter(decoder, [tokens[:1]])  # how a block rotates by position shows on any hidden states
        if passengers:
            batches = passengers.tokens.split(recipe.micro_batch)
            passengers.batches = enter(decoder, batches, counted=False, shelf=shelf)
            self.batches += passengers.batches
        clock.lap("forward")

    def embedding(self, stored: Stored | None = None) -> Iterator[LayerReport]:
        _claim_embedding(self.model, self._plan)
        self._clock.lap("forward")
        for stream, each in enumerate(self._outputs):
            group = _embedding_group(self.model)
            if stored:
                self._take(group, stream, stored)
            else:
                yield from self._round([group], each, ROUNDERS["rtn"])
            values = group.matrices[0].quantized
            add_stream(self._decoder, self.model.embedding, values, self.batches)
            if self._passengers and self.model.tied:
                self._passengers.heads.append(values)
            del group, values
            self._clock.lap("forward")
        give_back()

    def block(self, index: int, stored: Stored | None = None) -> Iterator[LayerReport]:
        clock, plan, name = self._clock, self._plan, self.model.block_names[index]
        self._learn(not stored)
        clock.lap(None)
        module = self.model.load_block(index)
        plan.forget()
        plan.claim(calibration.block_matrices(module, name))
        clock.lap("load")
        heads = None if stored else self._heads(module, index)
        stops = calibration.walk(
            module, index, name, self.batches, lambda weight: bool(plan.targets(weight)), clock, self._runtime,
            self._ranks, self._linear, again=self._recipe.offload != "none",
            residual=self._recipe.corrects_stream and not stored,
        )  # fmt: skip
        yield from self._groups(stops, stored, heads)
        del module, heads, stops
        self.model.release_block(index)
        give_back()
        clock.lap("forward")

    def _groups(
        self, stops: Iterator[tuple[int, list[Group]]], stored: Stored | None, heads: Attention | None
    ) -> Iterator[LayerReport]:
        for stream, groups in stops:
            if not stored:
                yield from self._round(groups, self._outputs[stream], self._rounder, heads)
                continue
            for group in groups:
                self._take(group, stream, stored)

    def head(self) -> Iterator[LayerReport]:
        """Of a model that has one of its own."""
        weight = _claim_head(self.model, self._plan)
        self._learn(True)
        for stream, each in enumerate(self._outputs):
            values = weight
            if any(each.mix.format(target.tensor, weight.shape[1]) for target in self._plan.targets("head")):
                stats = calibration.head_statistics(
                    self._decoder, self.batches, stream, self._clock, self._runtime.activation(stream, "head"),
                    self._ranks,
                )  # fmt: skip
                values = weight.clone()
                yield from self._round([Group([Matrix("head", weight, values)], stats)], each, self._rounder)
            if self._passengers:
                self._passengers.heads.append(values)

    def _learn(self, counted: bool) -> None:
        for batch in self._counted:
            batch.counted = counted

    def _heads(self, module: torch.nn.Module, index: int) -> Attention | None:
        """Of a block whose rows are coupled."""
        if not self._recipe.couples_rows:
            return None
        heads = read_attention(module, self.model.block_names[index], self._probe.x, self._probe.arguments[index])
        self._clock.lap("forward")
        asked = self._recipe.attention_aware is not None  # else no word on what it does not reach
        return heads if heads is None or asked else replace(heads, note="")

    def _round(
        self, groups: list[Group], output: Sink, rounder: Rounder, heads: Attention | None = None
    ) -> Iterator[LayerReport]:
        layers = list(
            round_groups(groups, self._plan, output.mix, rounder, self._settings, output.store, heads, self._ranks)
        )
        self._clock.lap("rounding")
        yield from layers

    def _take(self, group: Group, stream: int, stored: Stored) -> None:
        for matrix in group.matrices:
            for target in self._plan.targets(matrix.name):
                if self._outputs[stream].mix.format(target.tensor, matrix.weight.shape[1]):
                    values = stored(stream, self._plan.tensor(target), target.file_rows)
                    matrix.quantized[target.rows.to(matrix.quantized.device)] = values.to(matrix.quantized)


def calibrate(
    model: LazyModel,
    plan: Destinations,
    outputs: Sequence[Sink],
    tokens: torch.Tensor,
    recipe: Recipe,
    clock: Clock,
    passengers: Passengers | None = None,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
) -> Iterator[LayerReport]:
    """The whole walk, or what `journal` leaves of it; yields each tensor as it is rounded."""
    done = journal.done if journal else 0
    if done == _steps(model):
        return
    walk = Walk(model, plan, outputs, tokens, recipe, clock, passengers, ranks, folder)

    def keep(batches: Sequence[MicroBatch] = ()) -> None:
        if journal:
            clock.lap("forward")
            journal.save(batches)
            clock.lap("write")

    if journal and done:
        journal.restore(walk.batches)
        clock.lap("forward")
    else:
        yield from walk.embedding()
        keep(walk.batches)
    for index in range(max(0, done - 1), len(model.blocks)):
        yield from walk.block(index)
        keep(walk.batches)
    if _has_head(model):
        yield from walk.head()
        keep()
    if recipe.offload == "disk" and ranks.world > 1:
        ranks.texts("done")  # no process takes away the folder while another writes there


def mend(
    model: LazyModel,
    plan: Destinations,
    outputs: Sequence[Sink],
    tokens: torch.Tensor | None,
    recipe: Recipe,
    journal: Journal,
    folder: Path,
) -> None:
    """Do the torn steps of `journal` again and nothing else: matrices of the steps between become what was stored.
    Without `tokens` by rounding to nearest."""
    if tokens is None:
        for step, rounded in _nearest(model, plan, outputs, Clock(), last=max(journal.torn)):
            if step in journal.torn:
                deque(rounded, maxlen=0)
                journal.mended(step)
        return
    walk = Walk(model, plan, outputs, tokens, recipe, Clock(), folder=folder)
    for step in range(1, max(journal.torn) + 1):
        stored = None if step in journal.torn else journal.values
        if step == 1:
            rounded = walk.embedding(stored)
        else:
            rounded = walk.block(step - 2, stored) if step < len(model.blocks) + 2 else walk.head()
        deque(rounded, maxlen=0)
        if not stored:
            journal.mended(step)


def rounder_settings(recipe: Recipe) -> tuple[Rounder, Settings]:
    """What rounds the blocks and the head, and how."""
    rounder = blind if recipe.method == "rtn" else ROUNDERS[recipe.method]
    return rounder, Settings(
        recipe.damping, recipe.shrinkage, recipe.order, recipe.magr, recipe.seed if recipe.stochastic else None,
        recipe.refine, recipe.holds_out_one_in > 0, recipe.ridge,
    )  # fmt: skip


def held_out(sequences: int, one_in: int) -> torch.Tensor:
    """Which of some sequences choose λ, ρ and β: bool [sequences], evenly true for one in so many, or for none."""
    return torch.arange(1, sequences + 1) % one_in == 0 if one_in else torch.zeros(sequences, dtype=torch.bool)


def rounded_cache(recipe: Recipe, model: LazyModel) -> KVCache:
    """What the recipe's `kv_cache` makes of the model's keys and values. Raises UsageError where it does not fit."""
    k, v = (recipe.kv_cache.get(which, "f16") for which in ("k", "v"))
    return KVCache(k, v, head_sizes(model), r3="r3" in recipe.online_names)


def _runtime(model: LazyModel, plan: Destinations, outputs: Sequence[Sink], recipe: Recipe) -> calibration.Runtime:
    """Rounding of inputs, of keys and of values, as the recipe has them."""

    def rounding(stream: int, weight: str) -> Activation | None:
        """By the type of the weight; where its rows have several, by the first of them."""
        for target in plan.targets(weight):
            if fmt := outputs[stream].mix.format(target.tensor, plan.tensor(target).columns):
                return activation(recipe.activations, fmt)
        return None

    runtime = calibration.PLAIN if recipe.activations == "none" else calibration.Runtime(rounding)
    if not recipe.kv_cache:
        return runtime
    cache = rounded_cache(recipe, model)

    def prepare(block: torch.nn.Module, name: str) -> None:
        targets = [target for weight in calibration.block_matrices(block, name) for target in plan.targets(weight)]
        round_cache(block, cache.keys(_key_order(targets, cache)), cache.values())

    return replace(runtime, prepare=prepare)


def _key_order(targets: Sequence[gguf.Target], cache: KVCache) -> torch.Tensor | None:
    """Numbers of a key in the order in which the file has them, int64 [head size]: upstream's converter permutes those
    of some architectures for its kernel of RoPE. None where no tensor of keys alone shows one, or heads differ in size.
    """
    keys = next((target for target in targets if target.tensor.endswith(".attn_k.weight")), None)
    if keys is None or len(cache.sizes) > 1:
        return None
    (size,) = cache.sizes
    rows = keys.rows[keys.file_rows.argsort()].unflatten(0, (-1, size))
    ascending = rows.sort(1).values
    whole = (ascending == ascending[:, :1] + torch.arange(size)).all(1)  # else rows repeat, and tell nothing
    heads = rows[whole] - ascending[whole, :1]
    return heads[0] if len(heads) else None


def _steps(model: LazyModel) -> int:
    """Of a walk through `model`."""
    return 1 + len(model.blocks) + _has_head(model)


def _has_head(model: LazyModel) -> bool:
    return model.head is not None and not model.tied


def round_to_nearest(
    model: LazyModel, plan: Destinations, outputs: Sequence[Sink], clock: Clock, journal: Journal | None = None
) -> Iterator[LayerReport]:
    """Every tensor on its own, without calibration; goes on behind what `journal` has."""
    for _, rounded in _nearest(model, plan, outputs, clock, journal.done if journal else 0):
        yield from rounded
        if journal:
            journal.save([])
            clock.lap("write")


def _nearest(
    model: LazyModel, plan: Destinations, outputs: Sequence[Sink], clock: Clock, done: int = 0, last: int | None = None
) -> Iterator[tuple[int, Iterator[LayerReport]]]:
    """The steps behind `done`, to `last` of them, and what rounds their tensors to nearest once it is asked to."""
    steps = range(done + 1, (last or _steps(model)) + 1)

    def rounded(weights: Mapping[str, torch.Tensor]) -> Iterator[LayerReport]:
        for name, weight in weights.items():
            for each in outputs:
                group = Group([Matrix(name, weight, torch.empty_like(weight))], LayerStats(0))
                yield from round_groups([group], plan, each.mix, ROUNDERS["rtn"], _BLIND, each.store)
        clock.lap("rounding")

    clock.lap(None)
    if 1 in steps:
        _claim_embedding(model, plan)
        yield 1, rounded({"embedding": model.embedding.weight.detach()})
    for index, name in enumerate(model.block_names):
        if index + 2 not in steps:
            continue
        weights = calibration.block_matrices(model.load_block(index), name)
        plan.forget()
        plan.claim(weights)
        clock.lap("load")
        yield index + 2, rounded(weights)
        model.release_block(index)
        give_back()
    if _has_head(model) and _steps(model) in steps:
        yield _steps(model), rounded({"head": _claim_head(model, plan)})


_BLIND = Settings(0.0, 0.0, "natural")


def _claim_embedding(model: LazyModel, plan: Destinations) -> None:
    plan.claim({"embedding": model.embedding.weight.detach()})


def _embedding_group(model: LazyModel) -> Group:
    """The embedding, to be rounded to nearest: each of its rows is read alone, so there is nothing to correlate."""
    weight = model.embedding.weight.detach()
    return Group([Matrix("embedding", weight, weight.clone())], LayerStats(0))


def _claim_head(model: LazyModel, plan: Destinations) -> torch.Tensor:
    assert model.head is not None
    weight = model.head.weight.detach()
    plan.claim({"head": weight})
    return weight
