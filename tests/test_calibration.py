"""The two streams: what they carry, what is measured on the way, and that every block runs once per stream."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from formats.ggml_reference import q4_0, q8_0
from qronos_export import calibration, loans, precision
from qronos_export.calibration import Clock, Group, Runtime
from qronos_export.checkpoint import LazyModel, open_checkpoint
from qronos_export.decoder import Decoder, MicroBatch, add_stream, enter
from qronos_export.errors import CalibrationError
from qronos_export.live import Live
from qronos_export.states import Shelf, States
from tests.families import FAMILIES, make


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LazyModel:
    folder = make(request.param, tmp_path_factory.mktemp(request.param) / request.param)
    return LazyModel(open_checkpoint(str(folder)))


def tokens(model: LazyModel, samples: int = 6, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.embedding.num_embeddings, (samples, length), generator=generator)


def walk(
    model: LazyModel,
    ids: Tensor,
    batch: int,
    embedding: Tensor | None = None,
    runtime: Runtime = calibration.PLAIN,
    compute: str = "float32",
    residual: bool = False,
) -> Iterator[tuple[Group, list]]:
    """Every group of the model, in order, with the micro-batches (whose states are final once this is exhausted)."""
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, ids.split(batch))
    add_stream(decoder, model.embedding, model.embedding.weight if embedding is None else embedding, batches)
    for index, name in enumerate(model.block_names):
        block = model.load_block(index)
        stops = calibration.walk(
            block, index, name, batches, lambda weight: True, Clock(), runtime, linear=precision.linear(compute),
            residual=residual,
        )  # fmt: skip
        for _, groups in stops:
            for group in groups:
                yield group, batches
        model.release_block(index)


def coarse(weight: Tensor) -> Tensor:
    """A crude rounding, to set the streams apart."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
    return (weight / step).round() * step


def leave(model: LazyModel, batches: list, stream: int | None) -> Tensor:
    """What the head reads in a quantized stream, or in the float stream (None)."""
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    states = [batch.x if stream is None else batch.x_hat[stream] for batch in batches]
    return torch.cat([decoder.leave(batch.tokens, state) for batch, state in zip(batches, states, strict=True)])


def plain(model: LazyModel, ids: Tensor) -> Tensor:
    """The decoder's own forward with everything loaded."""
    for index in range(len(model.blocks)):
        model.load_block(index)
    return model.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def test_streams_are_the_models_own_forward(model: LazyModel) -> None:
    """Rounded on the way, the float stream ends as the float model, the quantized stream as the rounded one."""
    ids = tokens(model)
    rounded: dict[str, Tensor] = {}
    ended: list = []
    for group, batches in walk(model, ids, batch=4):
        ended = batches
        for matrix in group.matrices:
            rounded[matrix.name] = coarse(matrix.weight)
            matrix.quantized.copy_(rounded[matrix.name])
    x, x_hat = leave(model, ended, None), leave(model, ended, 0)
    expected = plain(model, ids)
    # 1e-4: experts' sums run in another order than transformers' own
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    for index, name in enumerate(model.block_names):
        for weight_name, weight in calibration.block_matrices(model.blocks[index], name).items():
            weight.copy_(rounded.pop(weight_name))
    assert not rounded
    quantized = model.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(x_hat, quantized, rtol=1e-4, atol=1e-4)
    assert float((x - x_hat).abs().max()) > 1e-2, "the rounding was meant to be felt"


def test_streams_side_by_side_are_streams_alone(model: LazyModel) -> None:
    """Two roundings at once: each sees the statistics it would see in a run of its own."""
    ids = tokens(model)
    roundings = [lambda weight: weight, coarse]

    def run(chosen: list[int]) -> dict[tuple[int, str], Tensor]:
        decoder = Decoder(model.model.get_decoder(), model.blocks)
        batches = enter(decoder, ids.split(4))
        for _ in chosen:
            add_stream(decoder, model.embedding, model.embedding.weight, batches)
        seen = {}
        for index, name in enumerate(model.block_names):
            block = model.load_block(index)
            for stream, groups in calibration.walk(block, index, name, batches, lambda weight: True, Clock()):
                for group in groups:
                    for matrix in group.matrices:
                        seen[chosen[stream], matrix.name] = group.stats.cross.clone()
                        matrix.quantized.copy_(roundings[chosen[stream]](matrix.weight))
            model.release_block(index)
        return seen

    together, apart = run([0, 1]), {**run([0]), **run([1])}
    assert together.keys() == apart.keys()
    for key, cross in apart.items():
        assert torch.equal(together[key], cross), key


def test_statistics_are_those_of_hooks(model: LazyModel) -> None:
    """H and G of every linear equal second moments collected by plain forward hooks on the whole model."""
    ids = tokens(model)
    stats = {matrix.name: group.stats for group, _ in walk(model, ids, batch=4) for matrix in group.matrices}
    seen: dict[str, Tensor] = {}
    plain(model, ids)
    hooks = [
        module.register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.__setitem__(f"{name}.weight", inputs[0].flatten(0, -2))
        )
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    model.model.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert seen
    for name, inputs in seen.items():
        assert stats[name].tokens == len(inputs) == ids.numel()
        moment = inputs.T @ inputs / len(inputs)
        torch.testing.assert_close(stats[name].hessian, moment, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stats[name].cross, moment, rtol=1e-3, atol=1e-4)


def test_drift_of_the_residual_stream_is_that_of_hooks(model: LazyModel) -> None:
    """D of what writes to it equals what plain hooks on the float model and on the finished rounded one see."""
    ids, drifts, rounded = tokens(model), {}, {}
    for group, _ in walk(model, ids, batch=4, residual=True):
        for matrix in group.matrices:
            if group.stats.residual is not None:
                drifts[matrix.name] = group.stats.residual
            rounded[matrix.name] = coarse(matrix.weight)
            matrix.quantized.copy_(rounded[matrix.name])
    seen: list[dict[str, Tensor]] = []
    for stream in ("float", "quantized"):
        entered: dict[str, Tensor] = {}
        returned: dict[str, Tensor] = {}
        for index in range(len(model.blocks)):
            model.load_block(index)
        if stream == "quantized":
            for index, name in enumerate(model.block_names):
                for weight_name, weight in calibration.block_matrices(model.blocks[index], name).items():
                    weight.copy_(rounded[weight_name])

        def hook(module: nn.Module, args: tuple, output: Any, name: str, entered=entered, returned=returned) -> None:
            entered[name], returned[name] = args[0].flatten(0, -2), output

        hooks = [
            module.register_forward_hook(partial(hook, name=name))
            for name, module in model.model.named_modules()
            if name in model.block_names or (isinstance(module, nn.Linear) and "layers" in name)
        ]
        model.model.get_decoder()(input_ids=ids, use_cache=False)
        for each in hooks:
            each.remove()
        seen.append(entered)
        for name in model.block_names:
            attention = returned[next(key for key in returned if key.startswith(name) and key.endswith("o_proj"))]
            seen[-1][f"{name}, after attention"] = entered[name] + attention.flatten(0, -2)
    (x, x_hat), expected = seen, {}
    for name, block in zip(model.block_names, model.blocks, strict=True):
        for part, module in block.named_modules():
            if model.model.config.model_type != "gemma3_text" and isinstance(module, nn.Linear):
                before = {"o_proj": name, "down_proj": f"{name}, after attention", "c_proj": f"{name}, after attention"}
                if stands := before.get(part.rpartition(".")[2]):
                    gap, inputs = x[stands] - x_hat[stands], x_hat[f"{name}.{part}"]
                    expected[f"{name}.{part}.weight"] = gap.T @ inputs / len(inputs)
    assert drifts.keys() == expected.keys()
    for weight_name, drift in expected.items():
        torch.testing.assert_close(drifts[weight_name], drift, rtol=1e-3, atol=1e-5)
    assert not drifts or max(float(drift.abs().max()) for drift in drifts.values()) > 1e-3


def test_products_in_bfloat16_move_statistics_little(model: LazyModel) -> None:
    """A product is off by 2^-9 of itself; hidden states stay in float32. Experts may be sent another token."""
    ids, seen = tokens(model), {}
    for compute in ("float32", "bfloat16"):
        seen[compute] = {
            matrix.name: group.stats.hessian
            for group, batches in walk(model, ids, 4, compute=compute)
            for matrix in group.matrices
            if "experts" not in matrix.name and batches[0].x.dtype == torch.float32
        }
    assert seen["float32"].keys() == seen["bfloat16"].keys()
    off = [float((b - a).norm() / a.norm()) for a, b in zip(*(each.values() for each in seen.values()), strict=True)]
    assert off[0] == 0 and max(off) < 0.03, off
    assert max(off) > 1e-5


@pytest.mark.parametrize("again", [False, True])
def test_a_block_leaves_nothing_behind(model: LazyModel, again: bool) -> None:
    """The stream's copy of a block is gone with the walk, without the collector."""
    copies: list[weakref.ref[nn.Module]] = []
    runtime = Runtime(prepare=lambda block, name: copies.append(weakref.ref(block)))
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, tokens(model).split(2))
    add_stream(decoder, model.embedding, model.embedding.weight, batches)
    block, name = model.load_block(0), model.block_names[0]
    gc.collect()
    gc.disable()
    try:
        for _ in calibration.walk(block, 0, name, batches, lambda weight: True, Clock(), runtime, again=again):
            pass
        assert len(copies) == 1 and copies[0]() is None
    finally:
        gc.enable()
        model.release_block(0)


def offloaded(model: LazyModel, shelf: Shelf, ids: Tensor) -> tuple[dict, list[Tensor], int]:
    """A walk with two quantized streams, whose hidden states wait on `shelf`: H and G by stream and weight, the float
    and the second stream at the end, and the most bytes of tensors that were alive in blocks."""
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, ids.split(2), shelf=shelf)
    for weight in (model.embedding.weight, coarse(model.embedding.weight)):
        add_stream(decoder, model.embedding, weight, batches)
    seen, peak, again = {}, 0, shelf.offload != "none"
    for index, name in enumerate(model.block_names):
        block = model.load_block(index)
        with Live() as live:
            stops = calibration.walk(block, index, name, batches, lambda weight: True, Clock(), again=again)
            for stream, groups in stops:
                for group in groups:
                    for matrix in group.matrices:
                        seen[stream, matrix.name] = group.stats.hessian, group.stats.cross
                        matrix.quantized.copy_(coarse(matrix.weight))
        peak = max(peak, live.peak)
        model.release_block(index)
    return seen, [torch.cat([*(b.x for b in batches)]), torch.cat([b.x_hat[1] for b in batches])], peak


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_forwards_run_anew_bring_the_same(model: LazyModel, offload: str, tmp_path: Path) -> None:
    ids = tokens(model)
    seen, ended, _ = offloaded(model, Shelf(), ids)
    found, left, _ = offloaded(model, Shelf(offload, folder=tmp_path), ids)
    assert seen.keys() == found.keys()
    for key, (hessian, cross) in seen.items():
        assert torch.equal(found[key][0], hessian) and torch.equal(found[key][1], cross), key
    assert all(torch.equal(one, other) for one, other in zip(ended, left, strict=True))
    assert not any(tmp_path.iterdir()), "files last as long as what is in them"


def test_offloaded_memory_does_not_grow_with_text(tmp_path: Path) -> None:
    model = LazyModel(open_checkpoint(str(make("llama", tmp_path / "tiny"))))
    peaks = {}
    for offload in ("none", "disk"):
        peaks[offload] = [
            offloaded(model, Shelf(offload, folder=tmp_path), tokens(model, samples, 64))[2] for samples in (16, 64)
        ]
    assert peaks["none"][1] > 3 * peaks["none"][0]
    assert peaks["disk"][1] < 1.05 * peaks["disk"][0] < 0.5 * peaks["none"][0]


def test_offloaded_states_in_bfloat16_are_rounded_once_a_block(tmp_path: Path) -> None:
    for offload in ("cpu", "disk"):
        states = States(Shelf(offload, torch.bfloat16, tmp_path))
        x = torch.randn(2, 3, 5)
        states.append(x)
        assert states[0].dtype == torch.float32 and torch.equal(states[0], x.to(torch.bfloat16).float())
        states[0] = x[:1] * 2
        assert torch.equal(states[0], (x[:1] * 2).to(torch.bfloat16).float()) and len(states) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="is shorter than"):
        states[0]


class Choosy(nn.Module):
    """A linear for every sequence, and one for those that begin above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.always(hidden)
        return hidden + self.sometimes(hidden) if float(hidden[0, 0, 0]) > 0 else hidden


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("first", [-1.0, 1.0])
def test_a_layer_for_some_sequences_is_refused(first: float, again: bool) -> None:
    """Whether the sequences that it is for come first or not."""
    block = Choosy()
    block.always.weight.data.zero_()
    block.always.bias.data.zero_()
    batches = [MicroBatch(torch.zeros(1, 3), torch.full((1, 3, 4), sign), [{}]) for sign in (first, -first)]
    for batch in batches:
        batch.x_hat.append(batch.x)
    with pytest.raises(CalibrationError, match="sometimes is used for some"), torch.no_grad():
        list(calibration.walk(block, 0, "block", batches, lambda weight: True, Clock(), again=again))


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.shared(self.shared(hidden))

    batch = MicroBatch(torch.zeros(1, 3), torch.zeros(1, 3, 4), [{}])
    batch.x_hat.append(batch.x)
    with pytest.raises(CalibrationError, match="shared reads more than one tensor"), torch.no_grad():
        list(calibration.walk(Twice(), 0, "block", [batch], lambda weight: True, Clock()))


def test_each_weight_reads_what_its_own_type_rounds_to(model: LazyModel) -> None:
    """q coarsely, k as it is, v and the rest finely: the quantized stream is the model with its linears so hooked, the
    statistics are those of what each read, and the float stream knows nothing of it."""

    def rounding(_: int, weight: str) -> calibration.Activation | None:
        return q4_0 if "q_proj" in weight else None if "k_proj" in weight else q8_0

    ids, ended = tokens(model), []
    stats: dict[str, calibration.LayerStats] = {}
    for group, batches in walk(model, ids, batch=4, runtime=Runtime(rounding)):
        ended = batches
        assert {rounding(0, matrix.name) for matrix in group.matrices} == {group.activation}
        stats |= {matrix.name: group.stats for matrix in group.matrices}
    x, x_hat = leave(model, ended, None), leave(model, ended, 0)
    torch.testing.assert_close(x, plain(model, ids), rtol=1e-4, atol=1e-4)
    assert float((x - x_hat).abs().max()) > 1e-2, "the rounding was meant to be felt"
    if any(calibration.is_experts(part) for part in model.blocks[0].modules()):
        name = next(name for name in stats if ".experts.down_proj" in name)
        assert bool((stats[name].hessian != stats[name].cross).any())
        return  # a router's choices flip with the last bit
    seen: dict[str, Tensor] = {}

    def hook(name: str, given: Tensor) -> tuple[Tensor]:
        act = rounding(0, name)
        seen[name] = act(given) if act else given
        return (seen[name],)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: hook(f"{name}.weight", inputs[0]))
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    expected = plain(model, ids)
    for each in hooks:
        each.remove()
    assert float((x_hat - expected).abs().mean()) < 2e-2 * float((x - x_hat).abs().mean())  # some codes flip
    for name, inputs in seen.items():
        flat = inputs.flatten(0, -2)
        torch.testing.assert_close(stats[name].hessian, flat.T @ flat / len(flat), rtol=5e-2, atol=5e-3)


def test_batching_does_not_matter(model: LazyModel) -> None:
    ids = tokens(model)
    one, all_at_once = (
        [(group.matrices[0].name, group.stats) for group, _ in walk(model, ids, batch)] for batch in (1, 6)
    )
    for (name, a), (other, b) in zip(one, all_at_once, strict=True):
        assert name == other and a.tokens == b.tokens
        torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.cross, b.cross, rtol=1e-3, atol=1e-4)


def test_each_block_runs_once_per_stream(model: LazyModel) -> None:
    """A block's norms see every token once per stream, however many groups of layers it has."""
    calls: Counter[str] = Counter()
    norm = next(name for name, _ in model.blocks[0].named_modules() if name.endswith("layernorm"))
    original = type(model.blocks[0].get_submodule(norm)).forward

    def counted(self: nn.Module, hidden: Tensor) -> Tensor:
        calls["tokens"] += hidden.shape[0] * hidden.shape[1] if hidden.ndim == 3 else 0
        return original(self, hidden)

    ids = tokens(model)
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, ids.split(2))
    for _ in range(2):
        add_stream(decoder, model.embedding, model.embedding.weight, batches)
    kind = type(model.blocks[0].get_submodule(norm))
    norms = sum(
        type(part) is kind and part.weight.numel() == batches[0].x.shape[-1] for part in model.blocks[0].modules()
    )
    block = model.load_block(0)
    kind.forward = counted  # type: ignore[method-assign]
    try:
        groups = sum(len(each) for _, each in calibration.walk(block, 0, "block", batches, lambda _: True, Clock()))
    finally:
        kind.forward = original  # type: ignore[method-assign]
        model.release_block(0)
    assert groups >= 2 * 4
    assert calls["tokens"] == 3 * norms * ids.numel()  # the float stream and two quantized ones


def test_groups_share_inputs(model: LazyModel) -> None:
    """q, k, v together; gate and up together; experts one by one. No weight twice."""
    groups = [[matrix.name for matrix in group.matrices] for group, _ in walk(model, tokens(model, 2), batch=2)]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    wanted = {
        name
        for index, block in enumerate(model.block_names)
        for name in calibration.block_matrices(model.load_block(index), block)
    }
    routers = {name for name in wanted - set(names) if "router" in name or name.endswith(".gate.weight")}
    assert set(names) == wanted - routers
    attention = next(group for group in groups if any("q_proj" in name or "qkv" in name for name in group))
    assert len(attention) in (1, 3)


def test_experts_see_only_their_tokens(model: LazyModel) -> None:
    stats = {
        matrix.name: group.stats
        for group, _ in walk(model, tokens(model), batch=4)
        for matrix in group.matrices
        if ".experts." in matrix.name
    }
    if not stats:
        assert "moe" not in model.model.config.model_type and "mixtral" not in model.model.config.model_type
        return
    per_token = model.model.config.num_experts_per_tok
    for block in model.block_names:
        for stage in ("up_proj", "down_proj"):
            routed = [
                s.tokens - s.borrowed for name, s in stats.items() if name.startswith(f"{block}.") and stage in name
            ]
            assert sum(routed) == per_token * tokens(model).numel()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_see_few_tokens_learn_from_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up: from the sum of all experts' moments; down: from what they make of others' tokens themselves."""
    model = LazyModel(open_checkpoint(str(make(family, tmp_path / family, num_hidden_layers=1))))

    def experts(ids: Tensor) -> dict[str, Group]:
        found = [group for group, _ in walk(model, ids, batch=3) if ".experts." in group.matrices[0].name]
        return {group.matrices[0].name: group for group in found}

    few = tokens(model, 2, 12)
    lent = experts(few)
    monkeypatch.setattr(loans, "ENOUGH_TOKENS_PER_FEATURE", 0.0)
    alone = experts(few)
    up = [name for name in alone if "gate_up_proj" in name]
    routed = sum(alone[name].stats.tokens for name in up)
    whole = sum(alone[name].stats.tokens * alone[name].stats.hessian for name in up)
    for name, group in alone.items():
        own, both = group.stats, lent[name].stats
        assert own.borrowed == 0 and both.tokens - both.borrowed == own.tokens < own.features
        missing = 4 * own.features - own.tokens
        if name in up:
            assert both.borrowed == min(missing, routed)
            pooled = whole / routed
            mixed = (own.tokens * own.hessian + both.borrowed * pooled) / both.tokens
            assert torch.allclose(both.hessian, mixed, atol=1e-5)
        else:
            assert both.borrowed == min(missing, few.numel())
            assert torch.linalg.matrix_rank(both.hessian, rtol=1e-5) > own.tokens


def test_the_quantized_stream_starts_from_the_quantized_embedding(tmp_path: Path) -> None:
    model = LazyModel(open_checkpoint(str(make("llama", tmp_path / "llama"))))
    ids = tokens(model)
    table = model.embedding.weight.clone()
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, ids.split(4))
    add_stream(decoder, model.embedding, coarse(table), batches)
    assert torch.equal(model.embedding.weight, table)
    assert torch.equal(torch.cat([b.x for b in batches]), table[ids])
    assert torch.equal(torch.cat([b.x_hat[0] for b in batches]), coarse(table)[ids])
