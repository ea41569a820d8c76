"""Forwards that stop where a weight is about to be used, and go on when told.

A decoder block runs inside a greenlet. Its `nn.Linear` modules, and the modules that hold transformers 5's fused 3-D
expert parameters, get a forward that hands the layer's input to the caller and waits. So one forward
per stream is enough, whatever the architecture, while all layers are rounded in between. Nothing here knows about
statistics or rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qronos_export.errors import CalibrationError
from qronos_export.precision import Linear
from qronos_export.residual import Used, Writer, Writing, find_writers

_UNEVEN = (
    "is used for some calibration sequences and not for others. What a model runs for some tokens only can be "
    "calibrated where transformers fuses it as experts; use --method rtn --transforms none."
)
Writers = dict[str, Writer]
Activation = Callable[[Tensor], Tensor]
"""Rounds what a layer reads: float [..., features] to the like."""


@dataclass(frozen=True)
class Routed:
    """What an experts module is given: `hidden` [tokens, hidden] and the expert of each slot, `index` [tokens, k]."""

    hidden: Tensor
    index: Tensor
    inner: dict[int, Tensor] | None = None  # expert -> input of its down projection [its tokens, intermediate]

    def tokens(self, expert: int) -> Tensor:
        """Rows of `hidden` routed to `expert`: int64 [its tokens]."""
        return (self.index == expert).nonzero()[:, 0]


@dataclass
class Stop:
    """A place where forwards wait: linears that read one tensor, or one projection of all experts of a block.

    members: names of the modules below the block, in order of use.
    stage:   "linear", or "up" / "down" of an experts module.
    writer:  where a single linear adds what it returns to the residual stream.
    """

    stage: str
    members: list[str] = field(default_factory=list)
    writer: Writer | None = field(default=None, repr=False)


def met(expected: Stop | None, found: Stop | None) -> None:
    """Raises CalibrationError unless a forward has come to the stop that others wait at; None is the block's end."""
    if found is not expected:
        missed = expected or found
        assert missed is not None
        raise CalibrationError(f"{missed.members[0]} {_UNEVEN}")


class Block:
    """A decoder block whose forwards report to whoever switched into them. Owns the replaced forwards."""

    def __init__(
        self,
        module: nn.Module,
        wanted: Callable[[str], bool],
        activation: Callable[[str, str], Activation | None] = lambda name, stage: None,
        linear: Linear = F.linear,
    ) -> None:
        """`wanted(name)` says whether the weight of the linear or experts module `name` will be rounded;
        `activation(name, stage)` rounds what its weights of that stage read. What is reported is not rounded yet.
        `linear` multiplies by these weights."""
        self._activation, self._product = activation, linear
        self.module = module
        self._stops: list[Stop] | None = None
        self._record: Callable[[str, str, Any], None] | None = None
        self._streams: WeakKeyDictionary[greenlet, dict[str, Tensor]] = WeakKeyDictionary()
        self._hooks: list[Any] = []
        self.twice: list[str] = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and wanted(name):
                part.forward = self._linear(name, part)  # type: ignore[method-assign, assignment]
            elif is_experts(part) and wanted(name):
                part.forward = self._experts(name, part)

    def restore(self) -> None:
        """Give the modules their own forwards back. They and ours hold each other: without this neither is freed."""
        for part in self.module.modules():
            part.__dict__.pop("forward", None)
        self._unhook()

    def observe(
        self, hidden: Tensor, kwargs: dict[str, Any], writers: Callable[[Writers], Writers] | None = None
    ) -> tuple[list[Stop], list[Any], Tensor]:
        """Run once without waiting: the stops in order, what arrived at each, and the block's output.

        Linears that read the same tensor share a stop, however far apart they are. `twice` then names those that read
        several tensors, of which the stop has the first. Given `writers`, layers that write to the residual stream are
        looked for; a `Writing` arrives then at stops of those that it lets pass.
        """
        stops: list[Stop] = []
        arrivals: list[Any] = []
        known: dict[tuple[int, ...], Stop] = {}

        def record(name: str, stage: str, payload: Any) -> None:
            before = next((stop for stop in stops if name in stop.members and stop.stage == stage), None)
            if stage == "linear":
                key = (payload.data_ptr(), payload.numel(), payload.shape[-1], payload._version)
                if before and (known.get(key) is not before or name == before.members[0]):
                    self.twice.append(name)
                if before:
                    return
                if key in known:
                    known[key].members.append(name)
                    return
                known[key] = stop = Stop("linear", [name])
            elif before:
                self.twice.append(name)
                return
            else:
                stop = Stop(stage, [name])
            stops.append(stop)
            arrivals.append(payload)  # keeps the tensor alive, so no later one can take its address

        self._record = record
        used = self._listen(hidden) if writers else []
        output = self._run(hidden, kwargs)
        self._record = None
        self._unhook()
        found = writers(find_writers(hidden, output, used)) if writers else {}
        for number, stop in enumerate(stops):
            if stop.stage == "linear" and len(stop.members) == 1 and stop.members[0] in found:
                stop.writer = writer = found[stop.members[0]]
                stream = next(each.given for each in used if each.name == writer.reader)
                assert stream is not None
                arrivals[number] = Writing(arrivals[number], stream)
        self.stop_at(stops)
        return stops, arrivals, output

    def _listen(self, hidden: Tensor) -> list[Used]:
        """What the next forward uses, in order."""
        used: list[Used] = []

        def of_its_size(tensor: Any) -> Tensor | None:
            fits = (
                isinstance(tensor, Tensor) and tensor.numel() == hidden.numel() and tensor.shape[-1] == hidden.shape[-1]
            )
            return tensor if fits else None

        for name, part in self.module.named_modules():
            writes = isinstance(part, nn.Linear) or is_experts(part)
            if next(part.children(), None) is not None and not writes:
                continue

            def hook(
                part: nn.Module, args: tuple[Any, ...], output: Any, name: str = name, writes: bool = writes
            ) -> None:
                given, returned = of_its_size(args[0] if args else None), of_its_size(output if writes else None)
                used.append(Used(name, given, returned))

            # In front of other hooks: what these make of its output, the layer does not write.
            self._hooks.append(part.register_forward_hook(hook, prepend=True))
        return used

    def stop_at(self, stops: list[Stop]) -> None:
        self._stops, streams = stops, self._streams
        for reader in {stop.writer.reader for stop in stops if stop.writer}:

            def hook(part: nn.Module, args: tuple[Any, ...], reader: str = reader) -> None:
                streams.setdefault(getcurrent(), {})[reader] = args[0]

            self._hooks.append(self.module.get_submodule(reader).register_forward_pre_hook(hook))

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def start(self, hidden: Tensor, kwargs: dict[str, Any]) -> greenlet:
        """A forward that has not begun; each `switch()` returns the next stop and its payload, the last None and the
        output. Raises CalibrationError in a layer that no stop is for."""
        return greenlet(lambda: (None, self._run(hidden, kwargs)))

    def _run(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output = self.module(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _arrive(self, name: str, stage: str, payload: Any) -> None:
        if self._record is not None:
            self._record(name, stage, payload)
        elif self._stops is not None:
            stop = next((stop for stop in self._stops if stop.stage == stage and name in stop.members), None)
            if stop is None:
                raise CalibrationError(f"{name} {_UNEVEN}")
            if stop.members[0] == name:
                if stop.writer:
                    payload = Writing(payload, self._streams[getcurrent()].pop(stop.writer.reader))
                getcurrent().parent.switch((stop, payload))

    def _linear(self, name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        activation = self._activation(name, "linear") or _as_it_is

        def forward(x: Tensor) -> Tensor:
            self._arrive(name, "linear", x)
            return self._product(activation(x), linear.weight, linear.bias)

        return forward

    def _experts(self, name: str, experts: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        up, down = (self._activation(name, stage) or _as_it_is for stage in ("up", "down"))

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self._arrive(name, "up", Routed(hidden, index))
            routed = Routed(up(hidden), index)
            used = [expert for expert in index.unique().tolist() if expert < experts.down_proj.shape[0]]
            inner = {
                expert: expert_inner(experts, expert, routed.hidden[routed.tokens(expert)], self._product)
                for expert in used
            }
            self._arrive(name, "down", Routed(hidden, index, inner))
            output = torch.zeros_like(hidden)
            for expert in used:
                token, slot = (index == expert).nonzero(as_tuple=True)
                part = _project(experts, "down_proj", expert, down(inner.pop(expert)), self._product)
                if getattr(experts, "has_post_expert_norm", False):
                    part = experts.post_expert_norm(part)
                output.index_add_(0, token, (part * weights[token, slot, None]).to(output.dtype))
            return output

        return forward


def _as_it_is(x: Tensor) -> Tensor:
    return x


def is_experts(module: nn.Module) -> bool:
    """Whether `module` keeps its experts as transformers 5 does: 3-D `down_proj` and `gate_up_proj` or `up_proj`."""
    return hasattr(module, "has_gate") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def expert_matrices(experts: Any, stage: str) -> Iterator[tuple[str, Tensor]]:
    """(name, weight [out, in] as a view) of every expert's projection of `stage`, "up" or "down"."""
    name = "down_proj" if stage == "down" else _up_name(experts)
    for expert, weight in enumerate(getattr(experts, name).detach()):
        yield f"{name}.{expert}", weight.T if experts.is_transposed else weight


def expert_inner(experts: Any, expert: int, hidden: Tensor, linear: Linear = F.linear) -> Tensor:
    """Input of `expert`'s down projection for `hidden` [tokens, hidden]: float [tokens, intermediate]."""
    up = _project(experts, _up_name(experts), expert, hidden, linear)
    return experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _project(experts: Any, name: str, expert: int, x: Tensor, linear: Linear) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(x, weight.T if experts.is_transposed else weight, bias)
