"""Two-sided rounding: its diffusion is that of the whole Kronecker product, and A is what attention makes of errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats import FORMATS, BlockFormat, Grid, IntegerGrid
from formats.block import Integers
from formats.parallel import one_thread
from qronos_export import calibration
from qronos_export.artifact.gguf import StoredTensor, Target
from qronos_export.attention import Attention, Rotation, _window, check_attention, read_attention
from qronos_export.calibration import Clock, Group, Matrix
from qronos_export.checkpoint import LazyModel, open_checkpoint
from qronos_export.corpus import held_out_text
from qronos_export.decoder import Decoder, add_stream, enter
from qronos_export.errors import UsageError
from qronos_export.evaluation import Evaluated, evaluate
from qronos_export.layers import round_groups
from qronos_export.plan import Mix
from qronos_export.proof import Held
from qronos_export.recipe import ORDERS, Recipe
from qronos_export.rounding import ROUNDERS, Coupled, Settings
from qronos_export.rounding.coupled import diffuse_rows
from qronos_export.rounding.least_squares import normal_equations
from qronos_export.rounding.sweep import sweep
from qronos_export.statistics import LayerStats
from tests import naive
from tests.families import FAMILIES, make

NORMED = ("qwen3", "qwen3_moe", "gemma3")
Q4 = FORMATS["Q4_0"]


def spread(size: int, seed: int = 0) -> Tensor:
    """A positive matrix of unequal, correlated directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return mixing.T @ mixing / (2 * size)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, LayerStats]:
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns) * 0.3 + torch.eye(columns)
    x = torch.randn(20 * columns, columns) @ mixing
    stats = LayerStats(columns)
    stats.update(x, x + 0.2 * torch.randn_like(x) @ mixing)
    return torch.randn(rows, columns) * 0.05, stats


@pytest.mark.parametrize("corrected", [False, True])
def test_diffusion_is_that_of_the_kronecker_product(corrected: bool) -> None:
    """Two heads of unequal size, their rows mixed with rows of no head: each as one long row of weights."""
    weight, stats = problem(11, 8)
    heads = [torch.tensor([7, 1, 4, 9]), torch.tensor([0, 2, 3])]
    coupled = [Coupled(rows, spread(len(rows), seed)) for seed, rows in enumerate(heads)]
    normal = normal_equations(stats, 0.01, "natural")
    step = 0.02
    first = weight[:, 0] + torch.linspace(-0.1, 0.1, 11) if corrected else None

    def round_rows(target: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        grid = Grid(torch.full((len(target), 1), step), Integers(-8, 7), group=8)
        codes, _, _ = sweep(target, normal.feedback, Q4, importance=stats.hessian.diagonal(), grid=grid, first=first)
        return codes, grid.values(codes)

    def nearest(value: Tensor) -> Tensor:
        return (value / step).round().clamp(-8, 7) * step

    codes, values, singular = diffuse_rows(weight, first, 0, coupled, 0.01, round_rows)
    assert not singular
    torch.testing.assert_close(codes * step, values)
    eye = torch.eye(8, dtype=torch.float64)
    damped = stats.hessian.double() + normal.damping * eye
    expected = torch.full((11, 8), torch.nan, dtype=torch.float64)
    for each in [*coupled, *(Coupled(torch.tensor([row]), torch.ones(1, 1)) for row in (5, 6, 8, 10))]:
        order = each.hessian.diagonal().argsort(descending=True)
        rows, outer = each.rows[order], each.hessian[order][:, order].double()
        outer += 0.01 * outer.diagonal().mean() * torch.eye(len(outer), dtype=torch.float64)
        given = None if first is None else first[rows].double()
        expected[rows] = naive.kronecker(weight[rows].double(), outer, damped, nearest, given)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["qronos", "gptaq", "gptq"])
def test_outputs_that_do_not_meet_change_nothing(name: str, order: str) -> None:
    """A = I, or any diagonal, is the one-sided problem: the same bytes, and the same loss computed in another way."""
    weight, stats = problem(24, 64)
    settings = Settings(0.01, 0.5, order)
    rows = torch.arange(24)
    coupled = [Coupled(rows[4:12], torch.eye(8)), Coupled(rows[12:20], torch.arange(1.0, 9.0).diag())]
    with one_thread(torch.device("cpu")):  # as coupled rows always are
        alone = ROUNDERS[name](weight, stats, Q4, settings)
        joined = ROUNDERS[name](weight, stats, Q4, replace(settings, coupled=coupled))
    assert torch.equal(joined.weight.blocks, alone.weight.blocks)
    torch.testing.assert_close(joined.loss, alone.loss, rtol=1e-3, atol=0)


def test_a_head_without_a_cost_is_rounded_alone() -> None:
    """Others keep theirs, and the note says how many went without."""
    weight, stats = problem(24, 64)
    settings = Settings(0.01, 0.5, "blocks")
    bad, good = Coupled(torch.arange(8), torch.full((8, 8), torch.nan)), Coupled(torch.arange(8, 16), spread(8, 1))
    alone, joined, both = (
        ROUNDERS["qronos"](weight, stats, Q4, replace(settings, coupled=coupled))
        for coupled in ([], [good], [bad, good])
    )
    assert torch.equal(both.weight.blocks, joined.weight.blocks)
    assert torch.equal(both.weight.blocks[:8], alone.weight.blocks[:8])
    assert both.method == "qronos" and "1 heads rounded row by row" in both.note and not joined.note


@pytest.mark.parametrize("name", ["qronos", "gptq"])
@pytest.mark.parametrize("fmt", [Q4, IntegerGrid(2, 32, symmetric=False)], ids=repr)
def test_the_cost_of_both_sides_falls(name: str, fmt: BlockFormat) -> None:
    """tr(A E H Eᵀ) to the best real weights: far below what rounding row by row leaves, while tr(E H Eᵀ) rises."""
    weight, stats = problem(48, 64)
    settings = Settings(0.01, 0.5, "blocks")
    coupled = [Coupled(torch.arange(start, start + 16), spread(16, start)) for start in (0, 16, 32)]
    shrinkage = settings.shrinkage if name == "qronos" else 0.0
    best, _ = normal_equations(stats, 0.01, "natural").project(weight, shrinkage)
    cost = []
    for chosen in ([], coupled):
        rounded = ROUNDERS[name](weight, stats, fmt, replace(settings, coupled=chosen))
        error = best - rounded.weight.dequantize()
        inputs = error @ stats.hessian @ error.T
        both = sum(float((each.hessian * inputs[each.rows][:, each.rows]).sum()) for each in coupled)
        cost.append((both, float(rounded.loss.sum())))
    (alone, own), (joined, handed_on) = cost
    assert joined < 0.6 * alone
    assert handed_on > own


@pytest.mark.parametrize("window", [9, 4])
def test_rotations_average_over_pairs_of_positions(window: int) -> None:
    """Against the sum over all m and the n ≤ m in its window, also where only a part of a head turns."""
    generator = torch.Generator().manual_seed(0)
    length, size, turned = 9, 10, 6
    angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.01]).repeat(2)
    rotation = replace(Rotation.of((angles.cos()[None], angles.sin()[None]), size, length), window=window)
    moment = spread(size)
    matrices = [rotation.apply(torch.eye(size)[:, None].expand(-1, length, -1))[:, n].T for n in range(length)]
    vector = torch.randn(length, size, generator=generator)
    turns = torch.complex(vector[:, :3], vector[:, 3:turned]) * torch.polar(torch.ones(length, 3), angles[:, :3])
    expected = torch.cat([turns.real, turns.imag, vector[:, turned:]], dim=1)
    torch.testing.assert_close(torch.stack([r @ v for r, v in zip(matrices, vector, strict=True)]), expected)
    for backwards in (False, True):
        total, pairs = torch.zeros(size, size), 0
        for m in range(length):
            for n in range(max(0, m + 1 - window), m + 1):
                between = matrices[n].T @ matrices[m]  # what q_m meets k_n with, seen from n
                between = between.T if backwards else between
                total, pairs = total + between @ moment @ between.T, pairs + 1
        torch.testing.assert_close(rotation.mean(moment, backwards=backwards), total / pairs, rtol=1e-4, atol=1e-4)
    mean = torch.randn(size, generator=generator)
    common = torch.zeros(size, size)
    for m in range(length):
        reach = range(max(0, m + 1 - window), m + 1)
        met = torch.stack([matrices[m].T @ matrices[n] @ mean for n in reach]).mean(0)
        common += len(reach) * met.outer(met)
    torch.testing.assert_close(rotation.common(mean), common / pairs, rtol=1e-4, atol=1e-4)
    alike = Rotation.of(None, size, length)
    torch.testing.assert_close(alike.common(mean), mean.outer(mean))
    torch.testing.assert_close(alike.mean(moment, backwards=True), moment)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LazyModel:
    return LazyModel(open_checkpoint(str(make(request.param, tmp_path_factory.mktemp(request.param) / "tiny"))))


def read(model: LazyModel) -> tuple[Attention, Tensor, LayerStats]:
    """The first block's attention, some hidden states, and the statistics of what its q, k and v read."""
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    ids = torch.randint(5, model.embedding.num_embeddings, (3, 16), generator=torch.Generator().manual_seed(0))
    batches = enter(decoder, ids.split(3))
    block, name = model.load_block(0), model.block_names[0]
    attention = read_attention(block, name, batches[0].x, batches[0].arguments[0])
    assert attention is not None
    add_stream(decoder, model.embedding, model.embedding.weight, batches)
    _, (group,) = next(calibration.walk(block, 0, name, batches, lambda _: True, Clock()))
    return attention, batches[0].x, group.stats


def test_attention_is_read_off_the_model(model: LazyModel) -> None:
    """Heads as config.json has them; and where q and k go through norms, they are left alone and it is said."""
    attention, _, _ = read(model)
    config = model.model.config
    assert (attention.query.heads, attention.key.heads, attention.value.heads) == (4, 2, 2)
    assert {p.size for p in (attention.query, attention.key, attention.value)} == {config.head_dim}
    normed = config.model_type.removesuffix("_text") in NORMED
    assert (attention.rotation is None) == normed
    assert bool(attention.note_of(attention.query.name)) == bool(attention.note_of(attention.key.name)) == normed
    if attention.value.name != attention.key.name:
        assert attention.note_of(attention.value.name) == ""


def test_heads_are_joined_by_what_attention_does(model: LazyModel) -> None:
    """A of every head: of q from the keys of its group, of k from its queries, of v from o."""
    attention, _, stats = read(model)
    size = attention.query.size
    coupled = {
        int(each.rows[0]) + 10_000 * kind: each
        for kind, projection in enumerate((attention.query, attention.key, attention.value))
        for each in attention.coupled(projection.name, stats)
        if projection.start <= int(each.rows[0]) < projection.rows.stop
    }
    two_sided = attention.rotation is not None
    assert len(coupled) == (4 + 2 if two_sided else 0) + 2
    out = attention.out.weight.view(-1, 4, size)
    for group in range(2):
        mine = [2 * group, 2 * group + 1]
        expected = sum(out[:, head].T @ out[:, head] for head in mine)
        value = coupled[20_000 + attention.value.start + group * size]
        torch.testing.assert_close(value.hessian, expected, rtol=1e-4, atol=1e-5)
        if attention.rotation is None:
            continue
        queries, keys, mean = (
            attention.query.moments(stats), attention.key.moments(stats), attention.key.means(stats)[group]
        )  # fmt: skip
        met = attention.rotation.mean(keys[group], backwards=True) - attention.rotation.common(mean)
        for head in mine:
            torch.testing.assert_close(coupled[head * size].hessian, met)
        found = coupled[10_000 + attention.key.start + group * size].hessian
        expected = attention.rotation.mean(queries[mine].sum(0), backwards=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 8, 100])
def test_sliding_windows_are_read_off_the_mask(window: int | None, tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "tiny", sliding_window=window)
    attention, hidden, _ = read(LazyModel(open_checkpoint(str(folder))))
    length = hidden.shape[1]
    assert attention.rotation is not None and attention.rotation.window == min(window or length, length)
    band = torch.ones(6, 6).tril() - torch.ones(6, 6).tril(-2)
    chunks = torch.ones(3, 3).tril().bool()
    assert _window(band.bool()) == _window(band.log()) == 2
    assert _window(torch.block_diag(chunks, chunks)) == 6


def test_moments_are_those_of_the_outputs(model: LazyModel) -> None:
    """Biases among them (Qwen2)."""
    attention, hidden, stats = read(model)
    norm = next(module for name, module in model.blocks[0].named_modules() if name == "input_layernorm")
    inputs = norm(hidden)
    for projection in (attention.query, attention.key):
        outputs = projection.of(projection.linear(inputs)).transpose(0, 1).flatten(1, 2)
        expected = outputs.mT @ outputs / outputs.shape[1]
        torch.testing.assert_close(projection.moments(stats), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(projection.means(stats), outputs.mean(1), rtol=1e-3, atol=1e-4)


class Shuffled:
    """A plan that puts rows of weights into the file in another order, and those of one matrix into two tensors."""

    def __init__(self, order: dict[str, Tensor]) -> None:
        self.order = order

    def targets(self, name: str) -> list[Target]:
        rows = self.order[name]
        parts = rows.split(len(rows) // 2) if name.endswith("v_proj.weight") else [rows]
        return [Target(f"{name}{i}", name, part, torch.arange(len(part))) for i, part in enumerate(parts)]

    def tensor(self, target: Target) -> StoredTensor:
        return StoredTensor(target.tensor, "F32", (len(target.rows), 64), 0, 0)

    def may_have_scale(self, tensor: str) -> bool:
        return False


class Nowhere:
    def put(self, *args: object) -> None:
        pass


def test_heads_are_found_wherever_their_rows_go(tmp_path: Path) -> None:
    """GGUF permutes rows of Llama's q and k; a head is what it is in the checkpoint."""
    model = LazyModel(open_checkpoint(str(make("llama", tmp_path / "tiny"))))
    attention, _, stats = read(model)
    weights = {p.name: p.linear.weight.detach() for p in (attention.query, attention.key, attention.value)}
    natural = {name: torch.arange(len(weight)) for name, weight in weights.items()}
    paired = {name: rows.view(-1, 2, 16).transpose(1, 2).flatten() for name, rows in natural.items()}
    paired[attention.value.name] = natural[attention.value.name]

    def rounded(order: dict[str, Tensor], attention: Attention | None) -> dict[str, Tensor]:
        group = Group([Matrix(name, weight, torch.zeros_like(weight)) for name, weight in weights.items()], stats)
        plan = Shuffled(order)
        tensors = [target.tensor for name in weights for target in plan.targets(name)]
        mix = Mix("Q4_0", 0, dict.fromkeys(tensors, "Q4_0"), tensors, {})
        list(round_groups([group], plan, mix, ROUNDERS["qronos"], Settings(0.03, 0.5, "blocks"), Nowhere(), attention))
        return {matrix.name: matrix.quantized for matrix in group.matrices}

    joined, shuffled, alone = rounded(natural, attention), rounded(paired, attention), rounded(natural, None)
    for name in weights:
        assert float((joined[name] != alone[name]).float().mean()) > 0.05
        assert float((joined[name] != shuffled[name]).float().mean()) < 0.01  # ties, and what follows from them


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_whole_model_is_rounded_by_both_sides(family: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:60_000])
    path = make(family, tmp_path / "tiny", head_dim=16, num_hidden_layers=2)
    recipe = Recipe(
        str(path), "INT3_G32", transforms="none", calibration=str(text), samples=4, sequence_length=64,
        attention_aware=True,
    )  # fmt: skip

    def measured(recipe: Recipe) -> Evaluated:
        *_, done = evaluate(str(path), recipe, Held(text, 64, 4), device="cpu")
        assert isinstance(done, Evaluated)
        return done

    both, one = measured(recipe), measured(replace(recipe, attention_aware=False))
    assert both.evaluation.kl_divergence != one.evaluation.kl_divergence
    said = [note for note in both.notes if "more than a rotation" in note]
    assert len(said) == (4 if family == "gemma3" else 0) and not one.notes


@pytest.mark.parametrize("method", ["gpfq", "rtn"])
def test_methods_without_feedback_are_refused(method: str) -> None:
    with pytest.raises(UsageError, match=f"method is {method}"):
        Recipe("demo", method=method, attention_aware=True)


def test_models_without_such_an_attention_are_refused() -> None:
    block = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"o_proj": torch.nn.Linear(8, 8)})})
    with pytest.raises(UsageError, match="does not fit tiny: no block has q_proj"):
        check_attention([block], "tiny")
