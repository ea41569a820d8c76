"""Two streams through the decoder blocks, and the statistics of every group of layers on the way.

The float stream carries the hidden states of the float model all the way from its embedding, the quantized stream
those of the model rounded so far, from its *quantized* embedding. At each group of layers that share an input both
streams wait, H and G are accumulated over all micro-batches, the caller rounds, and the quantized stream goes on with
the rounded weights (arXiv 2505.11695). Memory holds one block and the hidden states of the tokens, each twice, and what
forwards keep while they wait; or, where these are run again, one micro-batch.

Several formats share the float stream; each has a quantized stream of its own, so one more block and one more set of
hidden states. Their statistics exist one after another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from greenlet import greenlet
from torch import Tensor, nn

from qronos_export.decoder import Decoder, MicroBatch
from qronos_export.errors import CalibrationError
from qronos_export.loans import Loans
from qronos_export.precision import Linear
from qronos_export.ranks import ALONE, Ranks
from qronos_export.residual import Writing
from qronos_export.statistics import LayerStats
from qronos_export.suspended import (
    Activation,
    Block,
    Routed,
    Stop,
    Writers,
    expert_inner,
    expert_matrices,
    is_experts,
    met,
)

_TWICE = (
    "reads more than one tensor in a decoder block, and calibration would see only one of them; use --method rtn "
    "--transforms none."
)
PHASES = ("load", "calibration", "transforms", "forward", "statistics", "rounding", "write", "validate")


@dataclass
class Matrix:
    """A weight to be rounded. `weight` [out, in] is the float model's; write the stored values into `quantized`."""

    name: str
    weight: Tensor
    quantized: Tensor


@dataclass
class Group:
    """Weights that read the same input, rounded by the same `activation`, and what is known of that input."""

    matrices: list[Matrix]
    stats: LayerStats
    activation: Activation | None = None


@dataclass
class Clock:
    """Seconds spent per phase, for the report; a phase that did not happen took none."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str | None) -> None:
        """Book the time since the last lap on `phase`; None lets it go."""
        now = time.perf_counter()
        if phase is not None:
            self.seconds[phase] += now - self._since
        self._since = now


@dataclass(frozen=True)
class Runtime:
    """What a quantized stream does as whatever runs the file would.

    activation: (stream, weight, named like a checkpoint parameter) -> what rounds the weight's inputs.
    prepare:    changes the stream's copy of a block, given with the block's name, before it runs.
    """

    activation: Callable[[int, str], Activation | None] = lambda stream, weight: None
    prepare: Callable[[nn.Module, str], None] = lambda block, name: None


PLAIN = Runtime()


class _Forwards:
    """Of one stream through a block. All wait at a stop for those of other micro-batches; or, `again`, each is run from
    the start whenever it is asked for, so that only one is in memory, for about three times the products."""

    def __init__(
        self, start: Callable[[int], greenlet], stops: Sequence[Stop], count: int, again: bool, clock: Clock
    ) -> None:
        """`start(n)` begins the forward of micro-batch n of `count`."""
        self._start, self._stops, self._again, self._clock = start, [*stops, None], again, clock
        self._waiting = [] if again else [start(n) for n in range(count)]
        self._arrived: dict[int, tuple[int, Any]] = {}

    def arrive(self, n: int, number: int) -> Any:
        """What micro-batch n brings to a stop. Stops are met in order."""
        if self._again:
            forward = self._start(n)
            for each in range(number + 1):
                arrived = self._switch(forward, each)
            forward.throw()
            return arrived
        if self._arrived.get(n, (-1, None))[0] < number:
            self._arrived[n] = number, self._switch(self._waiting[n], number)
        return self._arrived[n][1]

    def leave(self, n: int) -> Tensor:
        """The block's output for micro-batch n."""
        output: Tensor = self.arrive(n, len(self._stops) - 1)
        self._arrived.pop(n, None)
        return output

    def _switch(self, forward: greenlet, number: int) -> Any:
        self._clock.lap("statistics")
        stop, payload = forward.switch()
        self._clock.lap("forward")
        met(self._stops[number], stop)
        return payload


class _Stream:
    """One quantized stream in one block: a copy of the block, and the forwards of all micro-batches. No function here
    holds the stream itself: a cycle would keep all of that until the collector comes."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        number: int,
        observed: Callable[[str], bool],
        runtime: Runtime,
        linear: Linear,
    ) -> None:
        self.number = number
        self.module = copied = copy.deepcopy(module)
        runtime.prepare(copied, name)

        def activation(part: str, stage: str) -> Activation | None:
            return _activation(copied, f"{name}.{part}", part, stage, partial(runtime.activation, number))

        self.activation = activation
        self.block, self._linear = Block(copied, observed, activation, linear), linear
        self._loans: dict[str, Loans] = {}

    def start(self, stops: list[Stop], batches: list[MicroBatch], index: int, again: bool, clock: Clock) -> None:
        block, number = self.block, self.number
        block.stop_at(stops)

        def start(n: int) -> greenlet:
            return block.start(batches[n].x_hat[number], batches[n].arguments[index])

        self.forwards = _Forwards(start, stops, len(batches), again, clock)

    def loans(self, stop: Stop, module: nn.Module, tokens: int) -> Loans | None:
        """Of the experts that wait at `stop`, whose float weights are in `module`; None for linears."""
        if stop.stage == "linear":
            return None
        (part,) = stop.members
        if part not in self._loans:
            activation = self.activation(part, "up")
            self._loans[part] = Loans(
                module.get_submodule(part), self.module.get_submodule(part), activation, tokens, self._linear
            )
        return self._loans[part]


def walk(
    module: nn.Module,
    index: int,
    name: str,
    batches: list[MicroBatch],
    wanted: Callable[[str], bool],
    clock: Clock,
    runtime: Runtime = PLAIN,
    ranks: Ranks = ALONE,
    linear: Linear = F.linear,
    again: bool = False,
    residual: bool = False,
) -> Iterator[tuple[int, list[Group]]]:
    """Run decoder block `index` once per stream; at each stop yield, for one quantized stream after another, its number
    and its groups, to be rounded before the next.

    name:    the block's, e.g. `model.layers.3`; the matrices' names begin with it.
    wanted:  whether a weight, named like a checkpoint parameter, will be rounded in any stream.
    runtime: what the quantized streams do beside reading rounded weights.
    ranks:   who else runs this block, with other sequences.
    linear:  multiplies by the weights that will be rounded, in all streams.
    again:   run forwards anew up to every stop, instead of having all of them wait there in memory.
    residual: also take statistics of how far the residual stream is off where a layer writes to it.
    No statistics where none of `batches` is counted, else the first is.
    Yields before that quantized stream uses the weights; afterwards `batches` holds the block's outputs.
    """

    def observed(part: str) -> bool:
        return _wanted(module, f"{name}.{part}", part, wanted)

    def start(n: int) -> greenlet:
        return float_block.start(batches[n + 1].x, batches[n + 1].arguments[index])

    def agreed(found: Writers) -> Writers:
        """None where processes find others."""
        return found if ranks.agree(str([(each, writer.reader) for each, writer in found.items()])) else {}

    first, *others = batches
    streams = [_Stream(module, name, number, observed, runtime, linear) for number in range(len(first.x_hat))]
    tokens = ranks.world * sum(batch.tokens.numel() for batch in batches if batch.counted)
    float_block = Block(module, observed, linear=linear)
    try:
        stops, arrivals, output = float_block.observe(first.x, first.arguments[index], agreed if residual else None)
        if float_block.twice:
            raise CalibrationError(f"{name}.{float_block.twice[0]} {_TWICE}")
        if not ranks.agree(str(stops)):
            raise CalibrationError(f"The processes of torchrun meet other layers in {name}; run one process.")
        forwards = _Forwards(start, stops, len(others), again, clock)
        for stream in streams:
            stream.start(stops, batches, index, again, clock)
        clock.lap("forward")
        for number, stop in enumerate(stops):
            for stream in streams:
                groups = _groups(module, stream.module, name, stop, partial(runtime.activation, stream.number))
                loans = stream.loans(stop, module, tokens)
                for n, batch in enumerate(batches):
                    if again and not batch.counted:
                        continue
                    payload = forwards.arrive(n - 1, number) if n else arrivals[number]
                    arrived = stream.forwards.arrive(n, number)
                    if batch.counted:
                        _observe(groups, stop, module, payload, arrived, batch.held, loans, clock, linear)
                    del payload, arrived
                stats = [group.stats for group in groups]
                ranks.combine(stats)
                if loans and stop.stage == "up":
                    loans.pool(stats)
                elif loans:
                    loans.settle(stats)
                for each in stats:
                    each.settle()
                clock.lap("statistics")
                yield stream.number, groups
                clock.lap(None)
            arrivals[number] = None
        first.x = output
        for n, batch in enumerate(others):
            batch.x = forwards.leave(n)
        for stream in streams:
            for n, batch in enumerate(batches):
                batch.x_hat[stream.number] = stream.forwards.leave(n)
    finally:
        for block in (float_block, *(stream.block for stream in streams)):
            block.restore()


def head_statistics(
    decoder: Decoder,
    batches: list[MicroBatch],
    stream: int,
    clock: Clock,
    activation: Activation | None,
    ranks: Ranks = ALONE,
) -> LayerStats:
    """Statistics of the output matrix's input: the final norm's outputs in the float stream and a quantized one, there
    rounded by `activation`."""
    stats = LayerStats(batches[0].x.shape[-1], batches[0].x.device)
    for batch in filter(lambda batch: batch.counted, batches):
        x, x_hat = decoder.leave(batch.tokens, batch.x), decoder.leave(batch.tokens, batch.x_hat[stream])
        clock.lap("forward")
        x_hat = activation(x_hat) if activation else x_hat
        stats.update(x.flatten(0, 1), x_hat.flatten(0, 1), held=batch.held)
        clock.lap("statistics")
    ranks.combine([stats])
    clock.lap("statistics")
    return stats


def block_matrices(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Every weight of a block that could be rounded, by parameter name; experts one by one. Views [out, in]."""
    found: dict[str, Tensor] = {}
    for part_name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            found[f"{name}.{part_name}.weight"] = part.weight.detach()
        elif is_experts(part):
            for stage in ("up", "down"):
                found.update((f"{name}.{part_name}.{leaf}", weight) for leaf, weight in expert_matrices(part, stage))
    return found


def _wanted(module: nn.Module, full: str, part: str, wanted: Callable[[str], bool]) -> bool:
    found = module.get_submodule(part)
    if isinstance(found, nn.Linear):
        return wanted(f"{full}.weight")
    return any(wanted(f"{full}.{leaf}") for stage in ("up", "down") for leaf, _ in expert_matrices(found, stage))


def _activation(
    module: nn.Module, full: str, part: str, stage: str, activation: Callable[[str], Activation | None]
) -> Activation | None:
    """The `activation` of a linear's weight; of all experts' weights of a stage, that of the first that has one."""
    if stage == "linear":
        return activation(f"{full}.weight")
    leaves = (leaf for leaf, _ in expert_matrices(module.get_submodule(part), stage))
    return next(filter(None, (activation(f"{full}.{leaf}") for leaf in leaves)), None)


def _weight(module: nn.Module, name: str) -> Tensor:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()


def _groups(
    module: nn.Module,
    quantized: nn.Module,
    name: str,
    stop: Stop,
    activation: Callable[[str], Activation | None],
) -> list[Group]:
    """Linears of one stop are a group where their inputs are rounded alike; of experts each is one."""
    if stop.stage == "linear":
        groups: dict[Activation | None, Group] = {}
        for member in stop.members:
            matrix = Matrix(f"{name}.{member}.weight", _weight(module, member), _weight(quantized, member))
            rounding = activation(matrix.name)
            if rounding not in groups:
                rows, columns = matrix.weight.shape
                stats = LayerStats(columns, matrix.weight.device, written=rows if stop.writer else 0)
                groups[rounding] = Group([], stats, rounding)
            groups[rounding].matrices.append(matrix)
        return list(groups.values())
    (member,) = stop.members
    shared = _activation(module, f"{name}.{member}", member, stop.stage, activation)
    experts = zip(
        expert_matrices(module.get_submodule(member), stop.stage),
        expert_matrices(quantized.get_submodule(member), stop.stage),
        strict=True,
    )
    return [
        Group([Matrix(f"{name}.{member}.{leaf}", weight, copied)], LayerStats(weight.shape[1], weight.device), shared)
        for (leaf, weight), (_, copied) in experts
    ]


def _observe(
    groups: list[Group],
    stop: Stop,
    module: nn.Module,
    x: Any,
    x_hat: Any,
    held: bool,
    loans: Loans | None,
    clock: Clock,
    linear: Linear,
) -> None:
    """Add one micro-batch. The quantized stream's routing decides which tokens an expert sees; the float input of
    those same tokens is the other half of each pair."""
    if stop.stage == "linear":
        gap = None
        if stop.writer:
            assert isinstance(x, Writing) and isinstance(x_hat, Writing)
            gap = (x.stream - x_hat.stream).flatten(0, -2).div_(stop.writer.gain)
            x, x_hat = x.inputs, x_hat.inputs
        for group in groups:
            group.stats.update(x.flatten(0, -2), _read(group, x_hat.flatten(0, -2)), gap, held=held)
        return
    assert isinstance(x, Routed) and isinstance(x_hat, Routed) and loans
    experts = module.get_submodule(stop.members[0])
    for expert, group in enumerate(groups):
        token = x_hat.tokens(expert)
        if stop.stage == "up":
            group.stats.update(x.hidden[token], _read(group, x_hat.hidden[token]), held=held)
            continue
        assert x_hat.inner is not None
        clock.lap("statistics")
        inner = expert_inner(experts, expert, x.hidden[token], linear)
        borrowed = loans.read(expert, group.stats, x, x_hat)
        clock.lap("forward")
        if len(token):
            group.stats.update(inner, _read(group, x_hat.inner[expert]), held=held)
        group.stats.update(borrowed[0], _read(group, borrowed[1]))


def _read(group: Group, x_hat: Tensor) -> Tensor:
    return group.activation(x_hat) if group.activation else x_hat
