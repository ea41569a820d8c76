"""What a model is made of, as a run meets it: groups of matrices that share an input, and what a forward that waits at
each of them keeps alive. Found by running one block of every shape on a few tokens, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qronos_export.attention import Attention, read_attention
from qronos_export.calibration import block_matrices
from qronos_export.checkpoint import HollowModel
from qronos_export.corpus import at_a_time
from qronos_export.decoder import Decoder
from qronos_export.live import Live
from qronos_export.suspended import Block, expert_matrices

_LENGTHS = (32, 64)  # of the sequences that are run; what grows with the square shows in their difference


@dataclass(frozen=True)
class Growth:
    """linear · length + square · length², for one sequence."""

    linear: float
    square: float

    @classmethod
    def through(cls, values: list[float]) -> Growth:
        short, long = _LENGTHS
        square = (values[1] / long - values[0] / short) / (long - short)
        return cls(values[0] / short - square * short, square)

    def of(self, sequences: int, length: int) -> float:
        return sequences * (self.linear * length + self.square * length**2)


@dataclass(frozen=True)
class Place:
    """Where forwards of a block wait.

    matrices:  name below the block -> (rows, columns); they read one tensor, or are all experts' matrices of a stage.
    experts:   how many of them are matrices of experts, each with statistics of its own; 0 for linear layers.
    held:      bytes that a waiting forward keeps alive, its argument not counted.
    payload:   bytes of what is read here.
    between:   bytes alive at most on the way here from the place before.
    flops:     of a forward that ends here.
    """

    matrices: dict[str, tuple[int, int]]
    experts: int
    held: Growth
    payload: Growth
    between: Growth
    flops: Growth

    @property
    def columns(self) -> int:
        return next(iter(self.matrices.values()))[1]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.matrices.values())


@dataclass(frozen=True)
class BlockSurvey:
    """A decoder block: its weights, its places, and a forward's operations (a product and a sum are two)."""

    weights: int
    largest: int  # weights of its largest matrix
    places: list[Place]
    flops: Growth
    after: Growth  # bytes alive at most behind the last place
    keys: int  # numbers that its cache keeps for a token
    heads: dict[str, tuple[int, int]]  # weights of q, k and v below the block -> heads whose rows go one by one, size


@dataclass(frozen=True)
class Survey:
    """A model. `blocks[i]` is the i-th decoder block's; vocabulary and hidden are the embedding's shape."""

    blocks: list[BlockSurvey]
    block_names: list[str]
    vocabulary: int
    hidden: int
    tied: bool
    head: bool
    sampled: int  # sequences that `self` samples at a time
    routed: int  # experts that a token is sent to
    arguments: int  # bytes of masks and positions that all blocks are given, for micro-batches of one shape

    @property
    def blocks_by_number(self) -> list[int]:
        """The first block of every kind."""
        return list({id(block): number for number, block in reversed(list(enumerate(self.blocks)))}.values())

    @property
    def outside(self) -> int:
        """Weights outside of the blocks: the embedding, and a head of its own."""
        return self.vocabulary * self.hidden * (2 if self.head and not self.tied else 1)


def survey(
    model: HollowModel, wanted: Callable[[int, str, tuple[int, int]], bool], sequences: int, length: int
) -> Survey:
    """`wanted(block, weight, shape)` says whether a weight will be rounded; micro-batches have `sequences` of `length`.

    Raises CheckpointError where blocks are not called one after another.
    """
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    entered = [decoder.enter(torch.full((1, each), 5)) for each in _LENGTHS]
    known: dict[Any, BlockSurvey] = {}
    blocks = []
    for index, name in enumerate(model.block_names):
        module = model.blocks[index]
        shapes = tuple((part, tuple(p.shape)) for part, p in module.named_parameters())
        masked = tuple(sorted((k, tuple(v.shape)) for k, v in entered[0][1][index].items() if isinstance(v, Tensor)))
        key = (shapes, masked, tuple(wanted(index, *each) for each in _matrices(module, name)))
        if key not in known:
            inputs = [(x, arguments[index]) for x, arguments in entered]
            known[key] = _block(model.load_block(index), partial(_any_wanted, module, name, index, wanted), inputs)
        blocks.append(known[key])
    shape = model.model.config.get_text_config()
    _, arguments = decoder.enter(torch.full((sequences, length), 5))
    vocabulary, hidden = model.embedding.weight.shape
    return Survey(
        blocks, model.block_names, vocabulary, hidden, model.tied, model.head is not None,
        at_a_time(shape, length), getattr(shape, "num_experts_per_tok", None) or 1, _bytes(arguments, set()),
    )  # fmt: skip


def _matrices(module: nn.Module, name: str) -> list[tuple[str, tuple[int, int]]]:
    return [(weight, (each.shape[0], each.shape[1])) for weight, each in block_matrices(module, name).items()]


def _any_wanted(
    module: nn.Module, name: str, index: int, wanted: Callable[[int, str, tuple[int, int]], bool], part: str
) -> bool:
    inside = f"{name}.{part}."
    return any(wanted(index, weight, shape) for weight, shape in _matrices(module, name) if weight.startswith(inside))


@torch.no_grad()
def _block(
    module: nn.Module, observed: Callable[[str], bool], inputs: list[tuple[Tensor, dict[str, Any]]]
) -> BlockSurvey:
    runs, flops = [], []
    block = Block(module, observed)
    try:
        for x, arguments in inputs:
            with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
                stops, arrivals, output = block.observe(x, arguments)
            flops.append(float(counter.get_total_flops()))
            del arrivals, output
            with Live() as live:
                forward = block.start(x, arguments)
                held, payload, between, before = [], [], [], [0.0]
                for _ in stops:
                    live.peak = live.now
                    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
                        _, arrived = forward.switch()
                    before.append(before[-1] + float(counter.get_total_flops()))
                    held.append(live.now)
                    payload.append(_bytes(arrived, set()))
                    between.append(live.peak)
                    del arrived
                live.peak = live.now
                _, output = forward.switch()
                runs.append((held, payload, between, before[1:], live.peak))
                del output, forward
    finally:
        block.restore()
    attention = read_attention(module, "", *inputs[0])
    places = []
    for number, stop in enumerate(stops):
        sizes = [Growth.through([float(run[kind][number]) for run in runs]) for kind in range(4)]
        part = module.get_submodule(stop.members[0])
        if stop.stage == "linear":
            shapes = {f"{each}.weight": _shape(module.get_submodule(each).weight) for each in stop.members}
        else:
            shapes = {f"{stop.members[0]}.{leaf}": _shape(w) for leaf, w in expert_matrices(part, stop.stage)}
        places.append(Place(shapes, 0 if stop.stage == "linear" else len(shapes), *sizes))
    counts = [parameter.numel() for parameter in module.parameters()]
    largest = max(_product(w) for _, w in _matrices(module, ""))
    return BlockSurvey(
        sum(counts), largest, places, Growth.through(flops), Growth.through([float(run[4]) for run in runs]),
        _keys(attention) if attention else 0, _heads(attention) if attention else {},
    )  # fmt: skip


def _keys(attention: Attention) -> int:
    return (attention.key.heads + attention.value.heads) * attention.key.size


def _heads(attention: Attention) -> dict[str, tuple[int, int]]:
    """A fused q, k and v is one weight with the heads of all three."""
    found: dict[str, tuple[int, int]] = {}
    for each in (attention.query, attention.key, attention.value):
        if attention.rotation is not None or each is attention.value:
            name = each.name.removeprefix(".")
            found[name] = found.get(name, (0, 0))[0] + each.heads, each.size
    return found


def _attention_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Both products of causal attention, half of each: shapes [sequences, heads, length, size]."""
    sequences, heads, length, size = query
    return 2 * sequences * heads * length * key[2] * size


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _shape(weight: Any) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _bytes(value: Any, seen: set[int]) -> int:
    """Of all tensors in `value`, however deep; each memory once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(_bytes(each, seen) for each in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(each, seen) for each in value)
    if hasattr(value, "hidden") and hasattr(value, "inner"):
        return sum(_bytes(each, seen) for each in (value.hidden, value.index, value.inner))
    return 0
