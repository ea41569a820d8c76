"""Which layers write to the residual stream, in blocks of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qronos_export.residual import Writing
from qronos_export.suspended import Block


class Shape(nn.Module):
    """A block of two layers, `o` and `down`, each behind a norm of its own unless said otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        gain = 0.22 if self.kind == "scaled" else 1.0
        attended = self.o(self.q(self.first(x)).tanh())
        if self.kind == "norms behind":
            x = x + self.first(attended)
            return x + self.second(self.down(self.up(x).relu()))
        if self.kind == "side by side":
            return x + attended + self.down(self.up(self.second(x)).relu())
        after = x + gain * attended
        mixed = self.down(self.up(self.second(after)).relu())
        if self.kind == "weighed by token":
            mixed = mixed * torch.sigmoid(x[..., :1])
        return after + gain * mixed


@pytest.mark.parametrize(
    ("kind", "found", "gain"),
    [
        ("plain", {"o": "first", "down": "second"}, 1.0),
        ("scaled", {"o": "first", "down": "second"}, 0.22),
        ("side by side", {"o": "first"}, 1.0),  # what down adds to stands nowhere
        ("norms behind", {}, None),
        ("weighed by token", {}, None),
    ],
)
@torch.no_grad()
def test_writers_are_found(kind: str, found: dict[str, str], gain: float | None) -> None:
    torch.manual_seed(0)
    module, x = Shape(kind), torch.randn(2, 7, 16)
    block = Block(module, lambda name: True)
    try:
        stops, arrivals, output = block.observe(x, {}, writers=True)
        assert {stop.members[0]: stop.writer.reader for stop in stops if stop.writer} == found
        assert {stop.writer.gain for stop in stops if stop.writer} <= {gain}
        forward = block.start(x, {})
        for stop, observed in zip(stops, arrivals, strict=True):
            met, arrived = forward.switch()
            assert met is stop and isinstance(arrived, Writing) == isinstance(observed, Writing) == bool(stop.writer)
            if stop.writer:
                assert torch.equal(arrived.inputs, observed.inputs) and torch.equal(arrived.stream, observed.stream)
        streams = [arrived.stream for arrived in arrivals if isinstance(arrived, Writing)]
        if kind in ("plain", "scaled"):
            layer, read = module.down, arrivals[-1].inputs
            torch.testing.assert_close(
                streams[-1] + gain * nn.functional.linear(read, layer.weight, layer.bias), output
            )
        assert not streams or torch.equal(streams[0], x)
        assert torch.equal(forward.switch()[1], output)
    finally:
        block.restore()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(module(x), output)


@torch.no_grad()
def test_nothing_is_looked_for_unless_asked() -> None:
    block = Block(Shape("plain"), lambda name: True)
    stops, arrivals, _ = block.observe(torch.randn(1, 3, 16), {})
    assert not any(stop.writer for stop in stops) and not any(isinstance(each, Writing) for each in arrivals)
    block.restore()
