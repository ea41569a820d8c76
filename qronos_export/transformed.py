"""Applies transforms to a checkpoint: another checkpoint comes out, block by block, that computes the same.

After the last one logits of both are compared; whatever misread the architecture shows there and is refused.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qronos_export.checkpoint import Checkpoint, CheckpointWriter, LazyModel, open_checkpoint
from qronos_export.decoder import Decoder, MicroBatch, advance, enter
from qronos_export.errors import TransformError
from qronos_export.memory import give_back
from qronos_export.precision import Linear, linear
from qronos_export.ranks import ALONE, Ranks
from qronos_export.statistics import add_squares, by_features, symmetric
from qronos_export.suspended import Block
from qronos_export.transforms import TRANSFORMS, Goal, InputStats, Outside, Transform, Whole
from qronos_export.transforms.anatomy import Anatomy, dissect
from qronos_export.transforms.scaling import search_format

SAME = 1e-4  # largest difference of logits that is arithmetic, as a share of the largest logit
PROBE = torch.arange(5, 37)[None]  # int64 [1, 32], any tokens: what a transform without inputs is shown
_PROBED = PROBE.shape[1]  # tokens that show how a block is joined, and that logits are compared on
_SAMPLE = 512  # inputs kept per module for searches that round them
SEQUENCES = 16  # of the calibration tokens: a search for a handful of exponents needs no more


def need_inputs(names: Iterable[str]) -> bool:
    """Whether one of the transforms looks at calibration tokens."""
    return any(each.needs_inputs or each.learns for each in (TRANSFORMS[name](Goal("Q4_0", 0)) for name in names))


def transformed(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    tokens: Tensor,
    formats: Sequence[str],
    seed: int,
    micro_batch: int,
    folder: Path,
    activations: str = "none",
    spin_steps: int = 100,
    kind: Callable[[Checkpoint, torch.device], LazyModel] = LazyModel,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    compute_dtype: str = "float32",
) -> Checkpoint:
    """`checkpoint` after the transforms `names`, written below `folder`; named like the original.

    tokens:  int64 [samples, length] on the device to compute on; some transforms look at the inputs they cause.
    formats: of the artifacts; searches round to the coarsest, which has the most to lose.
    activations, spin_steps, compute_dtype: as in a recipe; `kind` is how the model will run, online rotations or not.
    on_progress: called with (done, total) while a transform learns.
    ranks:       of which this is the first; the others `assist`.
    Raises TransformError where one does not fit the model, or where the result does not compute the same.
    """
    source = checkpoint
    format = coarsest(formats)
    for number, name in enumerate(names):
        try:
            target = folder / f"{number}-{name}" / checkpoint.folder.name  # the converter names a model by its folder
            transform = TRANSFORMS[name](Goal(format, seed + number, activations, spin_steps, compute_dtype, ranks))
            if transform.learns:
                transform.learn(whole(kind(source, tokens.device), tokens), on_progress or (lambda done, total: None))
                give_back()
            _apply(transform, source, target, tokens, micro_batch, ranks, linear(compute_dtype))
        except TransformError as error:
            ranks.send(None)
            raise TransformError(f"{name} does not fit {checkpoint.name}: {error}.") from error
        ranks.send(target)
        if source is not checkpoint:
            shutil.rmtree(source.folder)
        source = replace(
            open_checkpoint(str(target), trust_remote_code=checkpoint.trust_remote_code),
            name=checkpoint.name,
            source=checkpoint.source,
        )
    before, after = (logits(each, tokens[:1, :_PROBED]) for each in (checkpoint, source))
    off = float((after - before).abs().max() / before.abs().max())
    if not off < SAME:
        raise TransformError(
            f"{', '.join(names)} changed what {checkpoint.name} computes (logits by {off:.1e}); its architecture has "
            "connections these transforms do not know. Leave them out."
        )
    return source


def assist(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    tokens: Tensor,
    formats: Sequence[str],
    micro_batch: int,
    activations: str,
    compute_dtype: str,
    ranks: Ranks,
) -> None:
    """The part in `transformed` of every process but the first: some of the sequences and of the searches."""
    source, names = checkpoint, list(names)
    for number, name in enumerate(names, start=1):
        transform = TRANSFORMS[name](Goal(coarsest(formats), 0, activations, ranks=ranks))
        if transform.needs_inputs:
            with contextlib.suppress(TransformError):  # of which the first process tells
                _apply(transform, source, None, tokens, micro_batch, ranks, linear(compute_dtype))
        target: Path | None = ranks.receive()
        if target is None or number == len(names):
            return
        source = open_checkpoint(str(target), trust_remote_code=checkpoint.trust_remote_code)


def _spread(count: int, most: int) -> Tensor:
    """Numbers below `count` from all over: `most` of them, or all."""
    some = min(count, most)
    return torch.arange(some) * count // some


def coarsest(formats: Sequence[str]) -> str:
    """Of some artifacts' formats the one that has the most to lose."""
    return min(formats, key=lambda each: search_format(each, 256).bits_per_weight)


def _apply(
    transform: Transform,
    checkpoint: Checkpoint,
    target: Path | None,
    tokens: Tensor,
    micro_batch: int,
    ranks: Ranks,
    linear: Linear,
) -> None:
    """Transform all of `checkpoint`, written to `target`, if there is one."""
    model = LazyModel(checkpoint, tokens.device)
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    (probe,) = enter(decoder, [tokens[:1, :_PROBED]])
    some = tokens[_spread(len(tokens), max(SEQUENCES, ranks.world))]
    batches = enter(decoder, ranks.share(some, micro_batch)) if transform.needs_inputs else []
    head, tied = model.head, model.tied
    if head is None:
        raise TransformError("it has no output matrix")
    if tied and transform.unties:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        tied = False
    norm = _final_norm(model.model.get_decoder(), model.embedding.weight.shape[1])
    transform.outside(Outside(model.embedding, norm, head))
    writer = CheckpointWriter(model, target) if target else None
    for index in range(len(model.blocks)):
        module = model.load_block(index)
        anatomy = dissect(module, probe.x, probe.arguments[index])
        transform.block(anatomy, _observe(module, index, anatomy, batches, ranks, linear) if batches else {})
        if writer:
            writer.block(index)
        model.release_block(index)
        give_back()
    if writer:
        writer.close(tied=tied)


def whole(model: LazyModel, tokens: Tensor) -> Whole:
    """All of `model`, loaded. Raises TransformError where it has no output matrix to learn from."""
    if model.head is None:
        raise TransformError("it has no output matrix")
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    (probe,) = enter(decoder, [tokens[:1, :_PROBED]])
    blocks = [model.load_block(index) for index in range(len(model.blocks))]
    anatomies = [dissect(block, probe.x, probe.arguments[index]) for index, block in enumerate(blocks)]

    def leave(tokens: Tensor, hidden: Tensor) -> Tensor:
        return model.logits(tokens, decoder.leave(tokens, hidden))

    return Whole(blocks, anatomies, tokens, decoder.enter, leave)


def _final_norm(decoder: nn.Module, size: int) -> nn.Module:
    """The norm in front of the head: the decoder's only child with one weight per hidden number."""
    for _, child in decoder.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (size,):
            return child
    raise TransformError(f"{type(decoder).__name__} has no final norm we know")


@torch.no_grad()
def _observe(
    module: nn.Module, index: int, anatomy: Anatomy, batches: list[MicroBatch], ranks: Ranks, linear: Linear
) -> dict[str, InputStats]:
    """Run the block on all `batches`, which then hold its outputs; what came into the modules that scales concern, in
    all `ranks`."""
    modules = dict(module.named_modules())
    places = [reader.name for norm in anatomy.norms for reader in norm.readers[:1]]
    places += [pair.second.name for pair in anatomy.pairs if pair.is_linear and pair.second.name in modules]
    stats: dict[str, InputStats] = {}
    seen: dict[str, Tensor] = {}
    count = torch.tensor(len(batches))
    ranks.sum(count)

    def hook(name: str) -> None:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            if name not in stats:
                sums = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
                stats[name] = InputStats(sums, torch.zeros_like(x[0]), x[:0])
                seen[name] = torch.tensor(0)
            known = stats[name]
            add_squares(known.hessian, by_features(x))
            known.largest = torch.maximum(known.largest, x.abs().amax(0))
            share = -(-_SAMPLE // int(count))
            known.sample = torch.cat([known.sample, x[:: max(1, len(x) // share)][:share]])
            seen[name] += len(x)

        handles.append(modules[name].register_forward_pre_hook(observe))

    handles: list = []
    for name in dict.fromkeys(places):
        if name in modules:
            hook(name)
    block = Block(module, lambda name: True, linear=linear)
    try:
        advance(module, index, batches)
    finally:
        block.restore()
        for handle in handles:
            handle.remove()
    for name, known in ((place, stats[place]) for place in dict.fromkeys(places) if place in stats):
        ranks.sum(known.hessian, seen[name])
        known.hessian = symmetric((known.hessian / int(seen[name])).to(torch.float32))
        ranks.largest(known.largest)
        known.sample = ranks.joined(known.sample)
    return stats


@torch.no_grad()
def logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """What the head returns, before any cap of the model's: float32 [sequences, length, vocabulary], block by block."""
    model = LazyModel(checkpoint, tokens.device)
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, [tokens])
    for index in range(len(model.blocks)):
        advance(model.load_block(index), index, batches)
        model.release_block(index)
    assert model.head is not None
    return model.head(decoder.leave(tokens, batches[0].x)).float()
