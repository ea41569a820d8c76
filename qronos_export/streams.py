"""Every weight of a model rounded, block by block, in one walk of the float stream and of all quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from qronos_export import calibration, precision
from qronos_export.activations import Activation, activation
from qronos_export.artifact import gguf
from qronos_export.attention import read_attention
from qronos_export.calibration import Clock, Group, Matrix
from qronos_export.checkpoint import LazyModel, head_sizes, round_cache
from qronos_export.decoder import Decoder, MicroBatch, add_stream, enter
from qronos_export.kv_cache import KVCache
from qronos_export.layers import Destinations, Store, round_group
from qronos_export.memory import give_back
from qronos_export.plan import Mix
from qronos_export.ranks import ALONE, Ranks
from qronos_export.recipe import Recipe
from qronos_export.report import LayerReport
from qronos_export.rounding import ROUNDERS, Rounder, Settings, blind
from qronos_export.states import Shelf
from qronos_export.statistics import LayerStats


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
    mend: bool = False,
) -> Iterator[LayerReport]:
    """Embedding, every block, head: all streams side by side; yields each tensor as it is rounded, and goes on behind
    what `journal` has. Each of `ranks` runs its share of `tokens`, and may leave hidden states in files of `folder`.

    To `mend`, only the journal's torn steps are done, again; matrices of those before the last of them become what was
    stored.
    """
    redo = journal.torn if journal and mend else ()
    done = journal.done if journal and not redo else 0
    if done == _steps(model):
        return
    rounder, settings = rounder_settings(recipe)
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    runtime = _runtime(model, plan, outputs, recipe)
    linear = precision.linear(recipe.compute_dtype)
    shelf = Shelf(recipe.offload, torch.bfloat16 if recipe.state_dtype == "bfloat16" else None, folder)

    clock.lap(None)
    if not done:
        _claim_embedding(model, plan)
    apart = held_out(len(tokens), recipe.holds_out_one_in)
    batches = enter(decoder, ranks.share(tokens[~apart]), recipe.micro_batch, shelf=shelf)
    if bool(apart.any()):
        batches += enter(decoder, ranks.share(tokens[apart]), recipe.micro_batch, held=True, shelf=shelf)
    (probe,) = enter(decoder, tokens[:1], 1)  # how a block rotates by position shows on any hidden states
    if passengers:
        passengers.batches = enter(decoder, passengers.tokens, recipe.micro_batch, counted=False, shelf=shelf)
        batches = [*batches, *passengers.batches]
    if journal and done:
        journal.restore(batches)
    for stream, each in enumerate(outputs if not done else ()):
        clock.lap("forward")
        embedding = _embedding_group(model)
        if journal and redo and 1 not in redo:
            _take_stored(embedding, plan, each.mix, partial(journal.values, stream))
        else:
            yield from round_group(embedding, plan, each.mix, ROUNDERS["rtn"], settings, each.store, ranks=ranks)
        clock.lap("rounding")
        stored = embedding.matrices[0].quantized
        add_stream(decoder, model.embedding, stored, batches)
        if passengers and model.tied:
            passengers.heads.append(stored)
        del embedding, stored
    give_back()
    clock.lap("forward")
    if journal and not done:
        _keep(journal, 1, batches, redo)
        clock.lap("write")

    last = max(redo) - 1 if redo else len(model.blocks)
    for index, name in list(enumerate(model.block_names))[max(0, done - 1) : last]:
        clock.lap(None)
        kept = bool(redo) and index + 2 not in redo
        for batch in batches if redo else ():
            batch.counted = not kept
        module = model.load_block(index)
        plan.forget()
        plan.claim(calibration.block_matrices(module, name))
        clock.lap("load")
        heads = None
        if recipe.couples_rows:
            heads = read_attention(module, name, probe.x, probe.arguments[index])
            if heads and recipe.attention_aware is None:  # nobody asked: no word on what it does not reach
                heads = replace(heads, note="")
            clock.lap("forward")
        stops = calibration.walk(
            module, index, name, batches, lambda weight: bool(plan.targets(weight)), clock, runtime, ranks, linear,
            again=recipe.offload != "none",
        )  # fmt: skip
        for stream, groups in stops:
            each = outputs[stream]
            for group in groups:
                if journal and kept:
                    _take_stored(group, plan, each.mix, partial(journal.values, stream))
                    continue
                layers = list(round_group(group, plan, each.mix, rounder, settings, each.store, heads, ranks))
                clock.lap("rounding")
                yield from layers
        del heads
        model.release_block(index)
        give_back()
        if journal:
            clock.lap("forward")
            _keep(journal, index + 2, batches, redo)
            clock.lap("write")

    if model.head is not None and not model.tied and not redo:
        weight = _claim_head(model, plan)
        for stream, each in enumerate(outputs):
            if any(each.mix.format(target.tensor, weight.shape[1]) for target in plan.targets("head")):
                rounding = runtime.activation(stream, "head")
                stats = calibration.head_statistics(decoder, batches, stream, clock, rounding, ranks)
                head = Group([Matrix("head", weight, weight.clone())], stats)
                yield from round_group(head, plan, each.mix, rounder, settings, each.store, ranks=ranks)
                clock.lap("rounding")
                if passengers:
                    passengers.heads.append(head.matrices[0].quantized)
            elif passengers:
                passengers.heads.append(weight)
        if journal:
            journal.save([])
            clock.lap("write")
    if recipe.offload == "disk" and ranks.world > 1:
        ranks.texts("done")  # no process takes away the folder while another writes there


def _keep(journal: Journal, step: int, batches: Sequence[MicroBatch], redo: Sequence[int]) -> None:
    if not redo:
        journal.save(batches)
    elif step in redo:
        journal.mended(step)


def _take_stored(group: Group, plan: Destinations, mix: Mix, values_of: Callable[..., torch.Tensor]) -> None:
    """Give the matrices of `group` the values that were stored when they were rounded."""
    for matrix in group.matrices:
        for target in plan.targets(matrix.name):
            if mix.format(target.tensor, matrix.weight.shape[1]):
                values = values_of(plan.tensor(target), target.file_rows)
                matrix.quantized[target.rows.to(matrix.quantized.device)] = values.to(matrix.quantized)


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
    return 1 + len(model.blocks) + (model.head is not None and not model.tied)


def round_to_nearest(
    model: LazyModel,
    plan: Destinations,
    outputs: Sequence[Sink],
    clock: Clock,
    journal: Journal | None = None,
    mend: bool = False,
) -> Iterator[LayerReport]:
    """Every tensor on its own, without calibration; goes on behind what `journal` has, or does its torn steps again."""
    redo = journal.torn if journal and mend else ()
    done = journal.done if journal and not redo else 0
    rtn, settings = ROUNDERS["rtn"], Settings(0.0, 0.0, "natural")

    def rounded(weights: Mapping[str, torch.Tensor], step: int) -> Iterator[LayerReport]:
        if redo and step not in redo:
            return
        for name, weight in weights.items():
            for each in outputs:
                group = Group([Matrix(name, weight, torch.empty_like(weight))], LayerStats(0))
                yield from round_group(group, plan, each.mix, rtn, settings, each.store)
        clock.lap("rounding")
        if journal:
            _keep(journal, step, [], redo)
            clock.lap("write")

    clock.lap(None)
    if not done:
        _claim_embedding(model, plan)
        yield from rounded({"embedding": model.embedding.weight.detach()}, 1)
    last = max(redo) - 1 if redo else len(model.blocks)
    for index, name in list(enumerate(model.block_names))[max(0, done - 1) : last]:
        weights = calibration.block_matrices(model.load_block(index), name)
        plan.forget()
        plan.claim(weights)
        clock.lap("load")
        yield from rounded(weights, index + 2)
        model.release_block(index)
        give_back()
    if model.head is not None and not model.tied and not redo and done < _steps(model):
        yield from rounded({"head": _claim_head(model, plan)}, _steps(model))


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
