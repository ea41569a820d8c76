"""The laws of the rounders, against naive float64 solvers (tests/naive.py)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from formats import FORMATS, BlockFormat, DenormalGrid, IntegerGrid, TernaryGrid, native
from formats.block import Codebook, Floats, Integers, Levels
from qronos_export.recipe import ORDERS
from qronos_export.rounding import ROUNDERS, Settings, chosen, gpfq, gptaq, gptq, qronos, rtn
from qronos_export.rounding.held_out import STEP
from qronos_export.rounding.least_squares import SingularError, column_order, normal_equations
from qronos_export.rounding.magr import clipped, magr, spectral_norm
from qronos_export.rounding.refine import _scales
from qronos_export.rounding.sweep import DivergedError, sweep
from qronos_export.statistics import LayerStats
from tests import naive
from tests.devices import DEVICES

Q4, Q8 = FORMATS["Q4_0"], FORMATS["Q8_0"]
BLOCKS = [
    *(fmt for fmt in FORMATS.values() if not fmt.is_float),
    *(IntegerGrid(bits, 64, symmetric=even) for bits in (2, 3, 4, 8) for even in (False, True)),
    TernaryGrid(64),
    DenormalGrid(4, 64),
]


def problem(
    rows: int = 12, columns: int = 64, tokens: int = 600, drift: float = 0.2, seed: int = 0, device: str = "cpu"
):
    """Correlated inputs X, drifted inputs X̂, weights, and their statistics."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns) * 0.3 + torch.eye(columns)
    x = torch.randn(tokens, columns) @ mixing
    x_hat = x + drift * torch.randn(tokens, columns) @ mixing
    x, x_hat, weight = x.to(device), x_hat.to(device), (torch.randn(rows, columns) * 0.05).to(device)
    stats = LayerStats(columns, device)
    stats.update(x, x_hat)
    return weight, stats, x, x_hat


def fixed(fmt: BlockFormat, weight: Tensor) -> tuple[object, naive.Nearest]:
    """A grid fitted beforehand, and its nearest value per column in float64."""
    grid = fmt.fit(weight)

    def nearest(values: Tensor, j: int) -> Tensor:
        padded = torch.zeros_like(weight)
        padded[:, j] = values.to(torch.float32)
        return grid.values(grid.nearest(padded))[:, j].to(torch.float64)

    return grid, nearest


def swept(target: Tensor, stats: LayerStats, damping: float, grid, first: Tensor | None = None, **options) -> Tensor:
    normal = normal_equations(stats, damping, "natural")
    codes, grid, _ = sweep(
        target, normal.feedback, Q4, importance=normal.hessian.diagonal(), grid=grid, first=first, **options
    )
    return grid.values(codes)


def close(ours: Tensor, naive_result: Tensor) -> bool:
    """Equal but for codes that lie on a rounding tie in one arithmetic and not the other: at most one in 200."""
    return bool(((ours.double() - naive_result).abs() > 1e-6).double().mean() < 0.005)


def test_gptq_is_optimal_brain_quantization() -> None:
    weight, stats, *_ = problem()
    grid, nearest = fixed(Q4, weight)
    damped = stats.hessian.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    assert close(swept(weight, stats, 0.01, grid), naive.obq(weight.double(), damped, nearest))


def test_qronos_is_the_papers_algorithm() -> None:
    weight, stats, *_ = problem()
    normal = normal_equations(stats, 0.01, "natural")
    target, _ = normal.project(weight, 1.0)
    grid, nearest = fixed(Q4, target)
    drift = stats.cross[:, 0] - stats.hessian[:, 0]
    first = weight[:, 0] + weight @ drift / stats.hessian[0, 0]
    ours = swept(target, stats, 0.01, grid, first)
    expected = naive.qronos(weight.double(), stats.hessian.double(), stats.cross.double(), normal.damping, nearest)
    assert close(ours, expected)


@pytest.mark.parametrize("written", [0, 12])
@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
def test_qronos_in_descending_order_is_the_papers_algorithm_on_reordered_columns(
    shrinkage: float, written: int
) -> None:
    """The rounder itself: order, shrinkage, the first code, scattering back, what its outputs are added to. Scales are
    chosen beforehand here."""
    weight, plain, x, x_hat = problem()
    stats = LayerStats(64, written=written)
    stats.update(x, x_hat, 0.3 * x_hat[:, :12] + 0.1 * torch.randn(len(x), 12) if written else None)
    torch.testing.assert_close(stats.hessian, plain.hessian)
    normal = normal_equations(stats, 0.01, "descending")
    order = normal.order
    assert order is not None and not torch.equal(order, torch.arange(64))
    target, _ = normal.project(weight, shrinkage)
    grid = Q4.fit(target, stats.hessian.diagonal())

    def nearest(values: Tensor, j: int) -> Tensor:
        padded = torch.zeros_like(weight)
        padded[:, order[j]] = values.to(torch.float32)
        return grid.values(grid.nearest(padded))[:, order[j]].to(torch.float64)

    hessian = stats.hessian.double()
    cross = hessian + shrinkage * (stats.cross.double() - hessian)
    permuted = [matrix[order][:, order] for matrix in (hessian, cross)]
    residual = shrinkage * stats.residual.double()[:, order] if written else 0.0
    expected = naive.qronos(weight.double()[:, order], *permuted, normal.damping, nearest, residual)
    ours = qronos(weight, stats, Q4, Settings(0.01, shrinkage, "descending")).weight.dequantize()
    assert close(ours[:, order], expected)


def test_ldlq_is_gptq() -> None:
    """QuIP's theorem: written with H's own factors, the same codes."""
    weight, stats, *_ = problem()
    settings = Settings(0.01, 1.0, "blocks")
    ours = ROUNDERS["ldlq"](weight, stats, Q4, settings)
    assert torch.equal(ours.weight.blocks, gptq(weight, stats, Q4, settings).weight.blocks) and ours.method == "ldlq"
    grid, nearest = fixed(Q4, weight)
    damped = stats.hessian.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    assert close(swept(weight, stats, 0.01, grid), naive.ldlq(weight.double(), damped, nearest))


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_gptaq_is_its_formula(shrinkage: float) -> None:
    weight, stats, *_ = problem()
    normal = normal_equations(stats, 0.01, "descending")
    order = normal.order
    grid = Q4.fit(_gptaq_target(weight, stats, shrinkage), stats.hessian.diagonal())

    def nearest(values: Tensor, j: int) -> Tensor:
        padded = torch.zeros_like(weight)
        padded[:, order[j]] = values.to(torch.float32)
        return grid.values(grid.nearest(padded))[:, order[j]].to(torch.float64)

    hessian, cross = (matrix.double()[order][:, order] for matrix in (stats.hessian, stats.cross))
    damping = normal.damping * torch.eye(len(hessian), dtype=torch.float64)
    expected = naive.gptaq(weight.double()[:, order], hessian + damping, cross + damping, shrinkage, nearest)
    ours = gptaq(weight, stats, Q4, Settings(0.01, shrinkage, "descending")).weight.dequantize()
    assert close(ours[:, order], expected)


def _gptaq_target(weight: Tensor, stats: LayerStats, shrinkage: float) -> Tensor:
    """What is swept, column by column: W + β W P, each row of P from its own small system."""
    normal = normal_equations(stats, 0.01, "descending")
    order = normal.order
    hessian, cross = (matrix.double()[order][:, order] for matrix in (stats.hessian, stats.cross))
    damped = hessian + normal.damping * torch.eye(len(hessian), dtype=torch.float64)
    target = weight.double()[:, order]
    for t in range(len(hessian) - 1):
        handed = torch.linalg.solve(damped[t + 1 :, t + 1 :], (cross - hessian)[t, t + 1 :])
        target[:, t + 1 :] += shrinkage * weight.double()[:, order[t], None] * handed
    return target[:, order.argsort()].float()


def test_magr_shrinks_extremes_at_little_cost() -> None:
    """Where the inputs leave a direction open, the largest weights of every group fall and the outputs hardly move."""
    torch.manual_seed(0)
    x = torch.randn(800, 20) @ torch.randn(20, 64)
    hessian = x.T @ x / len(x)
    weight = torch.randn(8, 64)
    assert spectral_norm(hessian) == pytest.approx(float(torch.linalg.matrix_norm(hessian, ord=2)), rel=0.02)
    smaller = magr(weight, hessian, 1e-2, 32)
    peaks, before = (w.view(-1, 32).abs().amax(1) for w in (smaller, weight))
    assert bool((peaks < before).all()) and float((peaks / before).mean()) < 0.75
    moved = float((x @ (smaller - weight).T).square().sum() / (x @ weight.T).square().sum())
    assert moved < 1e-2
    assert torch.equal(magr(weight, hessian, 0.0, 32), weight)


def test_magr_minimizes_its_sum() -> None:
    """Four fifths of what fifty times the steps bring, or more."""
    torch.manual_seed(0)
    x = torch.randn(800, 20) @ torch.randn(20, 64)
    hessian, weight = x.T @ x / len(x), torch.randn(8, 64)

    def total(v: Tensor) -> float:
        change = (v - weight) / weight.square().mean(1, keepdim=True).sqrt()
        fit = torch.linalg.vecdot(change @ hessian / torch.linalg.matrix_norm(hessian, ord=2), change).sum() / 2
        peaks = (v / weight.square().mean(1, keepdim=True).sqrt()).view(8, -1, 32).abs().amax(2)
        return float(fit + 1e-2 * peaks.sum())

    best, most = total(magr(weight, hessian, 1e-2, 32, steps=5000)), total(weight)
    assert best <= total(magr(weight, hessian, 1e-2, 32)) < best + 0.2 * (most - best)


def peaked(u: Tensor, rows: Tensor, paid: Tensor) -> Tensor:
    """What `clipped` minimizes: [...] of u [..., size]."""
    return (u - rows).square().sum(-1) / 2 + paid * u.abs().amax(-1)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [7, 32, 50])
def test_clipping_pays_for_the_largest(size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its definition: no other point is better, and rows cheaper than their peak become nothing."""
    if not compiled:
        monkeypatch.setattr(native, "peaks", lambda rows, paid: None)
    torch.manual_seed(0)
    rows = torch.randn(40, size)
    rows[3] = 0
    paid = torch.rand(40) * size / 2
    found = clipped(rows, paid)
    others = found + torch.randn(2000, 1, size) * torch.logspace(-3, 0, 2000)[:, None, None]
    assert bool((peaked(others, rows, paid) >= peaked(found, rows, paid) - 1e-5).all())
    assert torch.equal(clipped(rows, rows.abs().sum(1) + 1), torch.zeros_like(rows))
    assert torch.equal(clipped(rows, torch.zeros(40)), rows)


def test_gpfq_is_its_formula() -> None:
    weight, stats, *_ = problem()
    grid = Q4.fit(weight, stats.hessian.diagonal())

    def nearest(values: Tensor, j: int) -> Tensor:
        padded = torch.zeros_like(weight)
        padded[:, j] = values.to(torch.float32)
        return grid.values(grid.nearest(padded))[:, j].to(torch.float64)

    expected = naive.gpfq(weight.double(), stats.hessian.double(), stats.cross.double(), nearest)
    ours = gpfq(weight, stats, Q4, Settings(0.01, 1.0, "natural")).weight.dequantize()
    assert close(ours, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", [Q4, Q8])
def test_qronos_equals_gptq_when_the_streams_agree(order: str, fmt: BlockFormat) -> None:
    weight, _, x, _ = problem()
    same = LayerStats(64)
    same.update(x, x)
    torch.testing.assert_close(same.cross, same.hessian, rtol=1e-4, atol=1e-5)
    same.cross.copy_(same.hessian)  # one is a product, the other half a product: make the last bits agree too
    settings = Settings(0.01, 1.0, order)
    ours, theirs = qronos(weight, same, fmt, settings), gptq(weight, same, fmt, settings)
    assert torch.equal(ours.weight.blocks, theirs.weight.blocks)
    assert float(ours.mismatch.sum()) == 0


def test_shrinkage_zero_is_gptq() -> None:
    weight, stats, *_ = problem()
    settings = Settings(0.01, 0.0, "natural")
    assert torch.equal(
        qronos(weight, stats, Q4, settings).weight.blocks, gptq(weight, stats, Q4, settings).weight.blocks
    )


@pytest.mark.parametrize("name", ROUNDERS)
@pytest.mark.parametrize("order", ORDERS)
def test_white_inputs_give_round_to_nearest(name: str, order: str) -> None:
    weight, *_ = problem()
    stats = LayerStats(64)
    eye = torch.eye(64) * 8  # XᵀX / tokens = identity
    stats.update(eye, eye)
    ours = ROUNDERS[name](weight, stats, Q4, Settings(0.01, 1.0, order)).weight
    assert torch.equal(ours.blocks, rtn(weight, stats, Q4, Settings(0.01, 1.0, order)).weight.blocks)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [16, 24, 48, 96])
def test_blocks_of_any_size_are_met_as_a_whole(group: int, order: str) -> None:
    """Also where they do not divide the columns between two lazy updates, and with groups in a row."""
    weight, stats, *_ = problem(columns=96)
    fmt = IntegerGrid(4, group)
    ours = gptq(weight, stats, fmt, Settings(0.01, 1.0, order))
    codes, grid = fmt.unpack(ours.weight.blocks)
    assert codes.shape == weight.shape and grid.scale.shape == (len(weight), 96 // group)
    assert ours.loss.sum() < rtn(weight, stats, fmt, Settings(0.01, 1.0, "natural")).loss.sum()


@pytest.mark.parametrize("step", [1, 7, 16, 64])
def test_lazy_updates_do_not_change_the_result(step: int) -> None:
    weight, stats, *_ = problem()
    grid = Q4.fit(weight)
    assert close(swept(weight, stats, 0.01, grid, step=step), swept(weight, stats, 0.01, grid, step=32).double())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_bookkeeping_is_the_exact_loss(fmt: BlockFormat, order: str) -> None:
    """‖X̂(v − q)‖²/n + λ‖v − q‖² = Σ e² / U², whatever the format makes of a block."""
    weight, stats, *_ = problem(columns=256, tokens=1000)
    rounded = gptq(weight, stats, fmt, Settings(0.01, 1.0, order))
    error = (weight - rounded.weight.dequantize()).double()
    damped = stats.hessian.double() + rounded.damping * torch.eye(256, dtype=torch.float64)
    exact = ((error @ damped) * error).sum(1)
    torch.testing.assert_close(rounded.loss.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_the_order_of_blocks(block: int) -> None:
    """Every block, and every run of 32 or fewer in it, is met as a whole; the heaviest come first."""
    diagonal = torch.rand(512, generator=torch.Generator().manual_seed(0))
    order = column_order(torch.diag(diagonal), "blocks", block)
    assert order is not None and torch.equal(order.sort().values, torch.arange(512))
    for size in (min(32, block), block):
        whole = order.view(-1, size) // size
        assert bool((whole == whole[:, :1]).all())
    first = diagonal[order].view(-1, block)
    assert torch.equal(first[:, 0], first.amax(1)) and bool((first[1:, 0] <= first[:-1, 0]).all())
    runs = diagonal[order].view(-1, min(32, block))
    assert bool((runs[:, 1:] <= runs[:, :-1]).all())


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q4_K", "NVFP4", "MXFP4"])
def test_a_massive_input_comes_first(name: str) -> None:
    """The last input has nearly all of the power, and others go with it: rounded first, they make up for its error."""
    weight, _, x, _ = problem(rows=64, columns=512, tokens=4000)
    x = x.clone()
    x[:, 511] = 0
    x[::40] += 100 * torch.randn(512)
    x[::40, 511] = 20000.0
    stats = LayerStats(512)
    stats.update(x, x)
    settings = {order: Settings(1e-3, 0.5, order) for order in ("natural", "blocks")}
    error = {}
    for order, each in settings.items():
        stored = gptq(weight, stats, FORMATS[name], each).weight.dequantize()
        error[order] = float((x @ (stored - weight).T).square().sum())
    assert error["blocks"] < 0.7 * error["natural"]


def test_an_order_that_splits_blocks_needs_scales_beforehand() -> None:
    weight, stats, *_ = problem()
    with pytest.raises(ValueError, match="meets each block as a whole"):
        sweep(weight, torch.eye(64), Q4, importance=stats.hessian.diagonal(), order=torch.randperm(64))


@pytest.mark.parametrize("order", ["natural", "blocks"])
def test_the_corrections_ridge(order: str) -> None:
    """V leaves the gradient of ‖XWᵀ − X̂Vᵀ‖² / n + ρ‖V − W‖² zero; ρ = λ is what the paper's projection does."""
    weight, stats, *_ = problem()
    normal = normal_equations(stats, 0.01, order)
    unit = float(stats.hessian.diagonal().mean())
    for ridge in (0.01, 1.0):
        v, mismatch = normal.project(weight, 1.0, ridge)
        drift = weight @ (stats.cross - stats.hessian)
        torch.testing.assert_close(
            (v - weight) @ stats.hessian + ridge * unit * (v - weight), drift, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(mismatch, torch.linalg.vecdot(v - weight, drift), rtol=1e-3, atol=1e-5)
    for ours, paper in zip(normal.project(weight, 0.7, 0.01), normal.project(weight, 0.7), strict=True):
        torch.testing.assert_close(ours, paper, rtol=1e-4, atol=1e-6)
    less = [float(normal.project(weight, 1.0, ridge)[1].sum()) for ridge in (0.01, 0.1, 1.0, 10.0)]
    assert less == sorted(less, reverse=True)
    with pytest.raises(SingularError, match="not positive definite"):
        normal.project(weight, 1.0, -10.0)


def test_what_is_added_to_a_stream_makes_up_for_it() -> None:
    """With D, the projection is least squares of ‖XWᵀ + R − X̂Vᵀ − R̂‖², and the rounded weights come closer to it."""
    weight, stats, x, x_hat = problem(rows=24, columns=64, tokens=4000)
    gap = torch.randn(len(x), 24) + x_hat[:, :24]
    whole = LayerStats(64, written=24)
    whole.update(x, x_hat, gap)
    v, mismatch = normal_equations(whole, 1e-9, "natural").project(weight, 1.0)
    expected = torch.linalg.lstsq(x_hat.double(), (x @ weight.T + gap).double()).solution.T
    torch.testing.assert_close(v.double(), expected, rtol=1e-2, atol=1e-3)

    def left(values: Tensor) -> Tensor:
        return (x @ weight.T + gap - x_hat @ values.T).square().sum(0) / len(x)

    torch.testing.assert_close(left(weight) - left(v), mismatch, rtol=2e-2, atol=0)
    settings = Settings(1e-3, 1.0, "blocks")
    with_it, without = (qronos(weight, each, Q4, settings).weight.dequantize() for each in (whole, stats))
    assert float(left(with_it).sum()) < 0.9 * float(left(without).sum())
    rows = torch.tensor([5, 0, 17])
    alone = qronos(weight[rows], whole.of_rows(rows), Q4, settings).weight.dequantize()
    torch.testing.assert_close(alone, with_it[rows])
    halved = qronos(weight / 2, whole.of_rows(torch.arange(24), torch.full((24, 1), 2.0)), Q4, settings)
    torch.testing.assert_close(2 * halved.weight.dequantize(), with_it, rtol=1e-2, atol=1e-3)


def test_mismatch_is_what_projection_recovers() -> None:
    """For undamped least squares, ‖XW − X̂V‖² = ‖XW − X̂W‖² − mismatch, per row."""
    weight, stats, x, x_hat = problem()
    v, mismatch = normal_equations(stats, 1e-9, "natural").project(weight, 1.0)
    before = (x @ weight.T - x_hat @ weight.T).square().sum(0) / len(x)
    after = (x @ weight.T - x_hat @ v.T).square().sum(0) / len(x)
    torch.testing.assert_close(before - after, mismatch, rtol=2e-2, atol=0)
    assert bool((mismatch > 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_order_of_quality(fmt: BlockFormat, device: str) -> None:
    """On drifted, correlated inputs the output error falls from rtn to gptq to qronos, in every format."""
    weight, stats, x, x_hat = problem(rows=64, columns=256, tokens=4000, device=device)
    error, without_drift = {}, {}
    # Errors of two or three levels are so large that passing on all of them overshoots: λ has to hold them back.
    damping = 0.1 if fmt.bits_per_weight < 2.1 else 1e-3
    for name, rounder in ROUNDERS.items():
        stored = rounder(weight, stats, fmt, Settings(damping, 1.0, "natural")).weight.dequantize()
        error[name] = float((x @ weight.T - x_hat @ stored.T).square().sum())
        without_drift[name] = float((x_hat @ (weight - stored).T).square().sum())
    assert max(error["qronos"], error["gpfq"]) < error["rtn"], error
    assert without_drift["gptq"] < without_drift["rtn"], without_drift
    assert error["gptq"] < error["rtn"] or fmt.name == "Q8_0", error  # whose own error is a millionth of the drift's
    assert error["qronos"] < error["gptq"] or fmt.name == "Q1_0", error  # one bit's own error drowns the streams' drift


@pytest.mark.parametrize("name", ROUNDERS)
def test_dead_inputs_keep_their_weights(name: str) -> None:
    weight, _, x, x_hat = problem()
    x, x_hat = x.clone(), x_hat.clone()
    x[:, 5] = x_hat[:, 5] = 0
    x_hat[:, 40] = 0
    stats = LayerStats(64)
    stats.update(x, x_hat)
    rounded = ROUNDERS[name](weight, stats, Q8, Settings(0.01, 1.0, "natural"))
    stored = rounded.weight.dequantize()
    assert bool(torch.isfinite(stored).all())
    if name != "gpfq":
        # nothing reads these columns; rounding to 8 bits is all that may happen to them
        assert float((stored[:, [5, 40]] - weight[:, [5, 40]]).abs().max()) < float(weight.abs().max()) / 100
    if name in ("gptq", "qronos"):
        assert "2 inputs never active" in rounded.note


def test_singular_statistics_raise_the_damping_and_say_so() -> None:
    weight, *_ = problem()
    stats = LayerStats(64)
    x = torch.randn(3, 64)
    stats.update(x, x)
    rounded = gptq(weight, stats, Q4, Settings(0.0, 1.0, "natural"))
    assert rounded.method == "gptq" and "damping raised" in rounded.note
    assert bool(torch.isfinite(rounded.weight.dequantize()).all())


@pytest.mark.parametrize("name", ["qronos", "gptq"])
@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_hopeless_statistics_fall_back_to_nearest_and_say_so(name: str, fmt: BlockFormat) -> None:
    """One input overflowed: what comes is round to nearest with all columns alike."""
    weight, _, x, _ = problem(columns=256)
    x = x.clone()
    x[3, 17] = float("inf")
    stats = LayerStats(256)
    stats.update(x, x)
    rounded = ROUNDERS[name](weight, stats, fmt, Settings(0.01, 1.0, "natural"))
    assert rounded.method == "rtn" and "rounded to nearest" in rounded.note
    assert torch.equal(rounded.weight.blocks, fmt.quantize(weight))
    assert bool(torch.isfinite(rounded.loss).all())


@pytest.mark.parametrize("order", [None, torch.arange(64)])
def test_a_sweep_leaves_what_it_is_given(order: Tensor | None) -> None:
    weight, stats, *_ = problem()
    given, feedback = weight[:1].clone(), normal_equations(stats, 0.01, "natural").feedback
    sweep(given, feedback, Q4, importance=stats.hessian.diagonal(), order=order)
    assert torch.equal(given, weight[:1])


@pytest.mark.parametrize("ridge", [0.5, 1e-3])
def test_a_correction_is_least_squares(ridge: float) -> None:
    """(H + ρI)⁻¹ in float32 where ρ is large, against numpy's in float64."""
    weight, stats, *_ = problem(rows=8, columns=256)
    normal = normal_equations(stats, 0.01, "blocks")
    hessian, drift = stats.hessian.double(), (stats.cross - stats.hessian).double()
    rho = ridge * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    expected = weight.double() @ drift @ torch.linalg.inv(hessian + rho)
    found = normal.project(weight, 1.0, ridge)[0] - weight
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4", "NVFP4", "Q4_K", "TQ2_0"])
def test_feedback_that_diverges_is_told(name: str) -> None:
    """Between panels of columns, far ahead in a block that is about to be fitted, and in the last panel."""
    weight, importance = torch.randn(8, 512), torch.ones(512)
    early, ahead, late = torch.full((512, 512), 1e3), torch.eye(512), torch.eye(512)
    ahead[0, 300] = 3e38
    late[480:, 480:] = 1e30
    for values, feedback, says in (
        (weight * 1e30, early, "before"),
        (weight * 1e6, ahead, "before"),
        (weight, late, "in the last"),
    ):
        with pytest.raises(DivergedError, match=says):
            sweep(values, feedback, FORMATS[name], importance=importance)


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4", "NVFP4", "Q4_K", "TQ2_0"])
def test_what_is_no_number_ends_no_process(name: str) -> None:
    for value in (torch.nan, torch.inf):
        assert len(FORMATS[name].fit(torch.full((17, 256), value)).scale) == 17


@pytest.mark.parametrize("fmt", [FORMATS["Q4_0"], FORMATS["Q4_K"]], ids=repr)
def test_dead_inputs_do_not_bend_the_scales_of_living_ones(fmt: BlockFormat) -> None:
    """Whatever the unit of the activations."""
    weight, _, x, _ = problem(columns=256)
    x = x.clone()
    x[:, ::32] = 0
    results = []
    for unit in (1.0, 2.0**-8):
        stats = LayerStats(256)
        stats.update(x * unit, x * unit)
        results.append(gptq(weight, stats, fmt, Settings(0.01, 1.0, "natural")).weight.dequantize())
    assert float((results[0] != results[1]).float().mean()) < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROUNDERS)
@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_rounders_are_deterministic_and_storable(name: str, fmt: BlockFormat, device: str) -> None:
    weight, stats, *_ = problem(columns=256, device=device)
    settings = Settings(0.01, 0.5, "natural")
    one, two = (ROUNDERS[name](weight, stats, fmt, settings).weight for _ in range(2))
    assert torch.equal(one.blocks, two.blocks)
    codes, grid = fmt.unpack(one.blocks)
    assert torch.equal(fmt.pack(codes, grid), one.blocks) and one.blocks.device == weight.device
    assert torch.equal(one.dequantize().cpu(), fmt.dequantize(one.blocks.cpu()))


def test_rows_are_independent() -> None:
    weight, stats, *_ = problem(rows=24)
    settings = Settings(0.01, 0.5, "natural")
    whole = qronos(weight, stats, Q4, settings)
    parts = [qronos(part, stats, Q4, settings) for part in weight.split(5)]
    # Sums of another shape differ in their last bit, a tie then falls the other way, and the rest of that row follows.
    same = (whole.weight.blocks == torch.cat([part.weight.blocks for part in parts])).all(1)
    assert same.float().mean() > 0.7
    torch.testing.assert_close(whole.loss[same], torch.cat([part.loss for part in parts])[same], rtol=1e-3, atol=0)


def test_min_pivot_orders_by_what_is_left(block: int = 32) -> None:
    """With blocks of one column it is the greedy elimination of the smallest remaining diagonal entry; with larger ones
    blocks stay whole, and the bound Σ 1/U² is below that of natural order."""
    _, stats, *_ = problem(columns=96)
    hessian = stats.hessian.double()
    damped = hessian + 1e-4 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    order, left = column_order(stats.hessian, "min_pivot", 1), list(range(96))
    assert order is not None
    for place in order.flip(0).tolist():
        known = [each for each in range(96) if each not in left]
        part = damped[left][:, left]
        if known:
            part = part - damped[left][:, known] @ torch.linalg.solve(damped[known][:, known], damped[known][:, left])
        assert left[int(part.diagonal().argmin())] == place
        left.remove(place)
    whole = column_order(stats.hessian, "min_pivot", block)
    assert whole is not None and torch.equal(whole.sort().values, torch.arange(96))
    assert bool((whole.view(-1, block) // block == whole.view(-1, block)[:, :1] // block).all())
    bound = {
        name: float(normal_equations(stats, 1e-4, name, block).upper.diagonal().pow(-2).sum())
        for name in ("natural", "min_pivot")
    }
    assert bound["min_pivot"] < bound["natural"]


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_refining_lowers_the_loss(fmt: BlockFormat) -> None:
    """Row by row, by less each time, and the loss it reports is that of the bytes."""
    weight, stats, *_ = problem(rows=24, columns=256, tokens=1000)
    losses = []
    for rounds in range(4):
        rounded = gptq(weight, stats, fmt, Settings(0.01, 1.0, "blocks", refine=rounds))
        error = (weight - rounded.weight.dequantize()).double()
        damped = stats.hessian.double() + rounded.damping * torch.eye(256, dtype=torch.float64)
        exact = ((error @ damped) * error).sum(1)
        torch.testing.assert_close(rounded.loss.double(), exact, rtol=2e-3, atol=0)
        losses.append(exact)
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert losses[1].sum() < 0.99 * losses[0].sum()


def test_refined_scales_are_least_squares() -> None:
    """With one block a row and codes that stay, the scale is the optimum under H, to fp16."""
    weight, stats, *_ = problem(columns=32)
    fmt = FORMATS["Q4_0"]
    normal = normal_equations(stats, 0.01, "natural")
    plain = gptq(weight, stats, fmt, Settings(0.01, 1.0, "natural")).weight
    codes, grid = fmt.unpack(plain.blocks)
    better = _scales(codes.T.contiguous(), grid, weight, normal.damped, fmt)
    levels, damped = codes.double(), normal.damped.double()
    optimum = ((levels @ damped) * weight.double()).sum(1) / ((levels @ damped) * levels).sum(1)
    torch.testing.assert_close(better.scale[:, 0].double(), optimum, rtol=1e-3, atol=0)


LEVELS = [Integers(-8, 7), Codebook((0.0, 0.5, 1.5, -0.0, -3.0, 4.0, 7.0, -7.0)), Floats(torch.float8_e4m3fn)]


@pytest.mark.parametrize("levels", LEVELS, ids=repr)
def test_dither_keeps_the_mean(levels: Levels) -> None:
    """One of the two neighbours, in the mean the value; a level itself always, and the ends beyond them."""
    values = torch.linspace(-6.9, 6.9, 50)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([
        levels.value(levels.dither(values, torch.rand(50, generator=generator))) for _ in range(4000)
    ])  # fmt: skip
    gap = drawn.amax(0) - drawn.amin(0)
    assert bool(((drawn.amin(0) <= values) & (values <= drawn.amax(0)) & (gap > 0)).all())
    assert all(len(column.unique()) == 2 for column in drawn.T)
    assert bool(((drawn.mean(0) - values).abs() < 5 * gap / 2 / 4000**0.5).all())
    exact = levels.value(levels.nearest(values))
    assert torch.equal(levels.value(levels.dither(exact, torch.rand(50))), exact)
    ends = levels.value(levels.nearest(torch.tensor([-1e9, 1e9])))
    assert torch.equal(levels.value(levels.dither(torch.tensor([-1e9, 1e9]), torch.rand(2))), ends)


def test_stochastic_rounding_is_seeded() -> None:
    weight, stats, *_ = problem()
    one, same, other = (
        qronos(weight, stats, Q4, Settings(0.01, 0.5, "blocks", dither=seed)).weight.blocks for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_held_out_moments_are_apart() -> None:
    x, x_hat, gap = torch.randn(3, 300, 16)
    stats = LayerStats(16, written=16)
    for number, (a, b, c) in enumerate(zip(x.split(50), x_hat.split(50), gap.split(50), strict=True)):
        stats.update(a, b, c, held=number % 3 == 2)
    held = torch.arange(300) // 50 % 3 == 2
    assert stats.held is not None and stats.held.tokens == 100
    for ours, kept in ((stats.held, held), (stats.without_held(), ~held)):
        torch.testing.assert_close(ours.hessian, x_hat[kept].T @ x_hat[kept] / int(kept.sum()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.cross, x[kept].T @ x_hat[kept] / int(kept.sum()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.residual, gap[kept].T @ x_hat[kept] / int(kept.sum()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("written", [0, 12])
def test_beta_and_lambda_follow_the_held_out_tokens(written: int) -> None:
    """Mismatch that is the same on all tokens is trusted, mismatch that is noise of too few tokens is not; and what is
    chosen does better on held-out tokens than what was given, or as well. So it is with what outputs are added to."""
    torch.manual_seed(1)
    weight, mixing = torch.randn(12, 64) * 0.05, torch.randn(64, 64) * 0.3 + torch.eye(64)
    shift = torch.eye(64) + 0.1 * torch.randn(64, 64)

    def picked(tokens: int, lasting: bool) -> tuple[Settings, LayerStats]:
        x = torch.randn(tokens, 64) @ mixing
        x_hat = x @ shift if lasting else x + 0.5 * torch.randn(tokens, 64) @ mixing
        gap = 0.05 * (x_hat[:, 10:22] if lasting else torch.randn(tokens, 12))
        stats = LayerStats(64, written=written)
        for number, (a, b, c) in enumerate(zip(x.chunk(8), x_hat.chunk(8), gap.chunk(8), strict=True)):
            stats.update(a, b, c if written else None, held=number == 7)
        return chosen(weight, stats, Q4, Settings(0.01, 0.5, "blocks"), qronos), stats

    lasting, stats = picked(4000, True)
    assert lasting.shrinkage > 0.9
    assert picked(100, False)[0].shrinkage < 0.5
    assert stats.held is not None

    def left(settings: Settings) -> float:
        values = qronos(weight, stats.without_held(), Q4, settings).weight.dequantize()
        wanted = weight @ stats.held.cross + (stats.held.residual if written else 0.0)
        return float((values @ stats.held.hessian * values).sum() - 2 * (wanted * values).sum())

    assert left(lasting) < left(Settings(0.01, 0.5, "blocks"))
    beside = [left(replace(lasting, damping=lasting.damping * factor)) for factor in (STEP, 1 / STEP)]
    assert all(error >= left(lasting) for error in beside)
