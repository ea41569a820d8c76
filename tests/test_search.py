"""The compiled searches and error feedback are torch's: exactly, where sums are exact. So are threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats import FORMATS, native
from formats.affine_search import search_affine
from formats.block import Codebook, Grid, Integers, Levels, reciprocal
from formats.compiled import folder, how
from formats.parallel import at_once, side_by_side
from formats.scale_search import best_half_scale, grouped, search_scale, to_half
from formats.sums import code_sums, weighted_error
from qronos_export.cache import cache_folder
from qronos_export.rounding import Settings
from qronos_export.rounding.gptq import gptq
from qronos_export.rounding.sweep import ColumnGrid
from qronos_export.statistics import LayerStats

LEVELS = [Integers(-8, 7), Integers(0, 3), Integers(-127, 127), FORMATS["IQ4_NL"].levels, FORMATS["MXFP4"].levels]
SHAPES = [(16, 1), (32, 15), (32, 16), (5, 67), (576, 33)]  # whole vectors of groups, none, and some left over


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """What a function returns compiled, and by torch."""

    def call(function: Callable, *given: object) -> tuple[Tensor, Tensor]:
        assert how().startswith("compiled for"), how()
        compiled = function(*given)
        with monkeypatch.context() as without:
            without.setattr(native, "library", lambda: None)
            plain = function(*given)
        joined = [torch.stack(tuple(found)) if isinstance(found, tuple) else found for found in (compiled, plain)]
        return joined[0], joined[1]

    return call


def whole(size: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and importance whose sums float32 holds without rounding: small integers, the last group zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-20, 21, (size, groups), generator=generator).float()
    x[:, max(1, groups - 1) :] = 0.0
    return x, torch.randint(0, 3, (size, groups), generator=generator).float()


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("rows", [16, 37])
def test_fits_are_torchs(both: Callable, name: str, rows: int) -> None:
    """On weights of every size, and zeros, and a single weight: the bytes that torch finds, but for what it adds up in
    another order. Three levels, whose largest weights are found by bins, lose a thousandth at most."""
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(0)
    weights = torch.randn(rows, 512, generator=generator) * torch.logspace(-6, 2, rows)[:, None]
    weights[3] = 0
    weights[4, 1:] = 0
    importance = torch.rand(512, generator=generator)
    compiled, plain = both(lambda: fmt.quantize(weights, importance))
    off, before = ((fmt.dequantize(blocks) - weights).square() @ importance for blocks in (compiled, plain))
    if name in ("MXFP4", "NVFP4"):
        assert float((compiled != plain).float().mean()) < 1e-3
    assert bool((off <= before * 1.001).all())
    assert bool(torch.isfinite(off).all())


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: type(levels).__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", [0.25, 1.0, 2.0])
def test_sums_are_torchs(both: Callable, levels: Levels, shape: tuple[int, int], unit: float) -> None:
    """Halves between levels and weights beyond the ends included."""
    x, importance = whole(*shape)
    offset = torch.arange(shape[1]).remainder(5) * 0.5 - 1
    scale = torch.full_like(offset, unit)
    scale[-1] = -unit
    for shift in (None, offset):
        compiled, plain = both(code_sums, x, importance, levels, reciprocal(scale), shift)
        assert torch.equal(compiled, plain) and bool((plain != 0).any())
        compiled, plain = both(weighted_error, x, importance, scale, levels, shift)
        assert torch.equal(compiled, plain)


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: type(levels).__name__)
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "offset, anchors, first"])
def test_columns_with_feedback_are_torchs(both: Callable, levels: Levels, rows: int, more: bool) -> None:
    """Errors go five columns further on at least, so that float32 holds all of them."""
    columns, reach = 12, 20
    generator = torch.Generator().manual_seed(rows)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-40, 41, shape, generator=generator) / 8

    scale = torch.tensor([0.5, 1.0, -2.0, 0.0, 0.25]).repeat(rows, 1)
    grid = ColumnGrid(Grid(scale, levels, 4, torch.full_like(scale, 0.5) if more else None), 24)
    feedback, given = eighths(columns, reach).sign().triu(5) / 4, eighths(reach, rows)
    anchors, first = (eighths(columns, rows), eighths(rows)) if more else (None, None)
    places = 24 + torch.randperm(reach, generator=generator)[:columns]

    def diffused() -> tuple[Tensor, ...]:
        work, codes = given.clone(), grid.new_codes(torch.zeros(48, rows)).zero_()
        errors = torch.empty(columns, rows)
        grid.diffuse(work, errors, codes, feedback, places, anchors, first, None)
        return (*work[columns:], *errors, *codes.float())

    compiled, plain = both(diffused)
    assert torch.equal(compiled, plain)
    moved, codes = compiled[: reach - columns], compiled[reach:]
    assert not torch.equal(moved, given[columns:]) and bool((codes[places] != 0).any()) and not bool(codes[:24].any())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "Q4_K", "Q6_K", "Q2_K", "TQ2_0"])
@pytest.mark.parametrize("order", ["natural", "blocks", "descending"])
def test_a_sweep_is_torchs(monkeypatch: pytest.MonkeyPatch, name: str, order: str) -> None:
    """Where a last bit decides between two scales, all that follows in the row differs, but is no worse."""
    torch.manual_seed(0)
    x = torch.randn(1024, 512) * torch.logspace(0, 1, 512)[torch.randperm(512)] @ torch.randn(512, 512)
    stats = LayerStats.of(x.T @ x / 1024, x.T @ x / 1024, tokens=1024)
    weight, settings = torch.randn(50, 512), Settings(0.01, 1.0, order)

    def rounded() -> Tensor:
        return gptq(weight, stats, FORMATS[name], settings).weight.dequantize()

    compiled = rounded()
    monkeypatch.setattr(native, "diffuse", lambda *_: False)
    plain = rounded()
    assert int((compiled != plain).any(1).sum()) <= 12
    loss, lost = (float(torch.linalg.vecdot((v - weight) @ stats.hessian, v - weight).sum()) for v in (compiled, plain))
    assert loss == pytest.approx(lost, rel=1e-2)


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: type(levels).__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_search_for_a_scale_is_torchs(both: Callable, levels: Levels, shape: tuple[int, int]) -> None:
    top = 127.0 if isinstance(levels, Codebook) else float(levels.high)
    reach = (top, -top, top - 1, 1.25 * top)
    compiled, plain = both(search_scale, *whole(*shape), levels, reach, (0.5, 0.25))
    assert torch.equal(compiled, plain)
    assert float(plain[0]) != 0.0 and (shape[1] == 1 or float(plain[-1]) == 0.0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: type(levels).__name__)
@pytest.mark.parametrize("groups", [1, 16, 37])
def test_the_best_stored_scale_is_torchs(both: Callable, levels: Levels, groups: int, own: bool) -> None:
    """Of any size: below the normal numbers of sixteen bits, and beyond the largest. Candidates that are as good as
    equal may change places, no more."""
    generator = torch.Generator().manual_seed(groups)
    weights = torch.randn(3, 32 * groups, generator=generator) * 2.0 ** torch.tensor([[-20.0], [0.0], [26.0]])
    weights[1, -32:] = 0
    importance = torch.rand((3 if own else 1) * 32 * groups, generator=generator).view(-1, 32 * groups)
    reach = (float(levels.high), -float(levels.high)) if isinstance(levels, Integers) else (8.0, -8.0, 7.0)
    compiled, plain = both(best_half_scale, weights, importance, 32, levels, reach)
    for found in (compiled, plain):
        assert torch.equal(found, to_half(found)) and bool((found != 0).any())
    x, w = grouped(weights, importance, 32)
    ours, torchs = (weighted_error(x, w, found.flatten(), levels) for found in (compiled, plain))
    assert float(((ours - torchs).abs() > 1e-5 * torchs).float().mean()) < 0.05
    fine = levels == Integers(-127, 127)  # whose gains float32 tells apart least
    assert torch.allclose(ours.view(3, -1).sum(1), torchs.view(3, -1).sum(1), rtol=1e-2 if fine else 1e-3, atol=0)


@pytest.mark.parametrize("levels", [Integers(-8, 7), Integers(0, 3), Integers(0, 255)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_nearest_integers_are_torchs(both: Callable, levels: Integers, shifted: bool) -> None:
    """Halves and the ends included."""
    weights = torch.arange(-300, 340, dtype=torch.float32).view(4, 160) * 0.5
    scale = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5]).expand(4, 5).contiguous()
    grid = Grid(scale, levels, group=32, offset=torch.full_like(scale, 0.5) if shifted else None)
    compiled, plain = both(grid.nearest, weights)
    assert torch.equal(compiled, plain) and compiled.dtype == plain.dtype
    assert {int(plain.min()), int(plain.max())} == {levels.low, levels.high}


@pytest.mark.parametrize("high", [1, 3, 15, 31])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("below_zero", [False, True])
def test_the_search_for_scale_and_offset_is_torchs(
    both: Callable, high: int, shape: tuple[int, int], below_zero: bool
) -> None:
    compiled, plain = both(search_affine, *whole(*shape), high, below_zero)
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_1", "Q3_K", "Q2_K", "Q5_K", "IQ4_XS", "NVFP4", "MXFP4"])
def test_fits_leave_the_same_error_by_torch(both: Callable, name: str) -> None:
    """Candidates that are as good as equal may change places, no more."""
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(0)
    weights, importance = torch.randn(64, 512, generator=generator), torch.rand(512, generator=generator)
    compiled, plain = both(lambda: fmt.dequantize(fmt.quantize(weights, importance)))
    errors = [((found - weights).square() * importance).sum() for found in (compiled, plain)]
    assert float(errors[0] / errors[1]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q4_K", "IQ4_NL", "MXFP8_E4M3"])
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, columns = FORMATS[name], 256
    weights = torch.randn(2 * at_once(torch.device("cpu")) // columns + 3, columns)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.inference_mode():
            blocks = fmt.quantize(weights)
            found.append((blocks, fmt.dequantize(blocks), fmt.fit(weights).scale))
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_parts_keep_their_order_and_torch_its_threads() -> None:
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert side_by_side(lambda part: (part, torch.get_num_threads()), range(5), cpu) == [(n, 1) for n in range(5)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda part: 1 / part, [1, 0], cpu)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert side_by_side(str, [], cpu) == []


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/no/such/compiler", "No such file"), ("sh -c 'echo too old >&2; exit 1'", "too old")]
)
def test_without_a_compiler_torch_searches_and_says_so(compiler: str, reason: str, tmp_path: Path) -> None:
    script = (
        "import torch; from formats import FORMATS; from formats.compiled import how\n"
        "fmt, w = FORMATS['Q4_0'], torch.arange(-8.0, 8.0).repeat(2)[None]\n"
        "assert torch.equal(fmt.dequantize(fmt.quantize(w)), w); print(how())"
    )
    environment = {"CXX": compiler, "QRONOS_EXPORT_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("torch: ") and reason in run.stdout and str(folder().name) in run.stdout


@pytest.mark.parametrize("chosen", [{"QRONOS_EXPORT_CACHE": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}], ids=str)
def test_libraries_lie_in_the_packages_cache(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("QRONOS_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in chosen.items():
        monkeypatch.setenv(variable, value)
    assert folder().parent == cache_folder()
