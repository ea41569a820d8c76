"""Which layers write to the residual stream, in blocks of every shape, and what is known then of how far it is off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qronos_export import calibration
from qronos_export.calibration import Clock
from qronos_export.decoder import MicroBatch
from qronos_export.evaluation import Evaluated, evaluate
from qronos_export.events import Step
from qronos_export.proof import Held
from qronos_export.recipe import Recipe
from qronos_export.report import LayerReport
from qronos_export.residual import Writing
from qronos_export.suspended import Block
from tests.families import make


class Shape(nn.Module):
    """A block of two layers, `o` and `down`, each behind a norm of its own unless said otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        if kind == "faint attention":
            self.o.weight.data *= 4e-3
            self.o.bias.data *= 4e-3

    def forward(self, x: Tensor) -> Tensor:
        gain = 0.22 if self.kind in ("scaled", "faint attention") else 1.0
        norm = nn.functional.rms_norm(x, (16,)) if self.kind == "read later" else self.first(x)
        attended = self.o(self.q(norm).tanh())
        if self.kind == "read later":
            return x + attended + self.down(self.up(self.second(x)).relu())
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
        ("read later", {}, None),  # no module is given x before o runs
        ("faint attention", {"o": "first", "down": "second"}, 0.22),
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
        stops, arrivals, output = block.observe(x, {}, writers=lambda found: found)
        assert {stop.members[0]: stop.writer.reader for stop in stops if stop.writer} == found
        assert {stop.writer.gain for stop in stops if stop.writer} <= {gain}
        forward = block.start(x, {})
        for stop, observed in zip(stops, arrivals, strict=True):
            met, arrived = forward.switch()
            assert met is stop and isinstance(arrived, Writing) == isinstance(observed, Writing) == bool(stop.writer)
            if stop.writer:
                assert torch.equal(arrived.inputs, observed.inputs) and torch.equal(arrived.stream, observed.stream)
        streams = [arrived.stream for arrived in arrivals if isinstance(arrived, Writing)]
        if kind in ("plain", "scaled", "faint attention"):
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


@torch.no_grad()
def test_a_massive_token_decides_nothing() -> None:
    """What one token writes beyond all measure does not hide what attention writes for the others."""
    torch.manual_seed(0)
    module, x = Shape("plain"), torch.randn(1, 60, 16)
    module.up.weight[0], module.up.bias[0] = 0.0, -30.0
    module.up.weight[0, 0] = 10.0  # alone the first token opens this
    module.second.weight[:] = 1.0
    x[0, 0] = 0.0
    x[0, 0, 0] = 100.0
    module.down.weight[:, 0] = 1e5
    block = Block(module, lambda name: True)
    stops, *_ = block.observe(x, {}, writers=lambda found: found)
    block.restore()
    assert {stop.members[0]: stop.writer.reader for stop in stops if stop.writer} == {"o": "first", "down": "second"}


@torch.no_grad()
def test_no_numbers_and_changed_outputs_tell_nothing() -> None:
    """Nothing is found, and nothing raises; what a hook makes of a layer's output, the layer does not write."""
    block, x = Block(Shape("plain"), lambda name: True), torch.randn(1, 5, 16)
    x[0, 0, 0] = torch.nan
    assert not any(stop.writer for stop in block.observe(x, {}, writers=lambda found: found)[0])
    block.restore()
    module = Shape("plain")
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    module.o.register_forward_hook(lambda part, args, output: output @ turn)
    block = Block(module, lambda name: True)
    assert not any(stop.writer for stop in block.observe(torch.randn(1, 5, 16), {}, writers=lambda found: found)[0])
    block.restore()


@torch.no_grad()
def test_the_drift_is_in_units_of_the_writers_outputs() -> None:
    """A layer whose outputs count 0.22 times has to move them by 1 / 0.22 of what the stream is off by."""
    torch.manual_seed(0)
    module, ids = Shape("scaled"), torch.zeros(4, 7, dtype=torch.int64)
    x = torch.randn(4, 7, 16)
    x_hat = x + 0.1 * torch.randn_like(x)
    batches = []
    for part in range(0, 4, 2):
        batches.append(MicroBatch(ids[part : part + 2], x[part : part + 2], [{}]))
        batches[-1].x_hat.append(x_hat[part : part + 2])
    found = {}
    stops = calibration.walk(module, 0, "block", batches, lambda weight: True, Clock(), residual=True)
    for _, groups in stops:
        for group in groups:
            (matrix,) = group.matrices
            matrix.quantized.copy_((8 * matrix.weight).round() / 8)
            found[matrix.name] = group.stats.residual, matrix.quantized

    def inputs(stream: Tensor, of: dict[str, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """What o reads, the stream behind it and what down reads, by the module's weights or those given."""

        def apply(name: str, given: Tensor) -> Tensor:
            layer = getattr(module, name)
            weight = layer.weight if of is None else of[f"block.{name}.weight"]
            return nn.functional.linear(given, weight, layer.bias)

        mixed = apply("q", module.first(stream)).tanh()
        after = stream + 0.22 * apply("o", mixed)
        return mixed, after, apply("up", module.second(after)).relu()

    of = {name: quantized for name, (_, quantized) in found.items()}
    (_, after, _), (mixed_hat, after_hat, inner_hat) = inputs(x, None), inputs(x_hat, of)
    for name, gap, read in (("o", x - x_hat, mixed_hat), ("down", after - after_hat, inner_hat)):
        expected = (gap / 0.22).flatten(0, 1).T @ read.flatten(0, 1) / 28
        torch.testing.assert_close(found[f"block.{name}.weight"][0], expected, rtol=1e-4, atol=1e-6)
    assert found["block.q.weight"][0] is None and found["block.up.weight"][0] is None


@pytest.mark.parametrize(
    ("family", "writers"), [("llama", {"o_proj", "down_proj"}), ("mixtral", {"o_proj"}), ("gemma3", set())]
)
def test_the_report_says_who_made_up_for_the_stream(family: str, writers: set[str], tmp_path: Path) -> None:
    """With the setting and without it; asked for where there is nothing to correct, a note says so."""
    folder = make(family, tmp_path / family)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 400)
    recipe = Recipe(
        str(folder), format="Q4_0", transforms="none", calibration=str(text), samples=4, sequence_length=32,
        device="cpu", residual_aware=True,
    )  # fmt: skip

    def layers(**changes: object) -> tuple[list[LayerReport], list[str]]:
        *events, done = evaluate(str(folder), replace(recipe, **changes), Held(text, 32, 4))
        assert isinstance(done, Evaluated)
        return [each.layer for each in events if isinstance(each, Step) and each.layer], done.notes

    with_it, notes = layers()
    assert {each.name.split(".")[-2] for each in with_it if each.residual} == writers
    assert any("residual_aware" in note for note in notes) == (not writers)
    without, notes = layers(residual_aware=False)
    assert not any(each.residual for each in without) and not any("residual_aware" in note for note in notes)
    errors = [{each.name: each.error for each in found} for found in (with_it, without)]
    assert (errors[0] != errors[1]) == bool(writers)
