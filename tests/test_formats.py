"""Laws of every block format; libggml's own verdict is in llamacpp_tests/test_formats.py."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats import FORMATS, BlockFormat, DenormalGrid, FormatError, Grid, IntegerGrid, TernaryGrid, find_format
from formats import block as block_module
from tests.devices import DEVICES

INTEGERS = [IntegerGrid(bits, group, symmetric=even) for bits in (2, 3, 4, 8) for group in (32, 256) for even in (0, 1)]
INTEGERS += [TernaryGrid(64), DenormalGrid(3, 64), DenormalGrid(4, 32), DenormalGrid(8, 64)]
BLOCKS = [*(fmt for fmt in FORMATS.values() if not fmt.is_float), *INTEGERS]
FLOATS = [fmt for fmt in FORMATS.values() if fmt.is_float]

EDGES = {
    "zeros": torch.zeros(256),
    "one huge value": torch.cat([torch.tensor([3e38]), torch.zeros(255)]),
    "constant": torch.full((256,), -0.7),
    "subnormal": torch.full((256,), 1e-41),
    "scale underflows fp16": torch.linspace(-1e-9, 1e-9, 256),
    "scale overflows fp16": torch.linspace(-1e7, 1e7, 256),
    "alternating": torch.tensor([1.0, -1.0]).repeat(128),
    "one negative outlier": torch.cat([torch.tensor([-50.0]), torch.linspace(0, 1, 255)]),
}


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_stored_values_survive_a_round_trip(fmt: BlockFormat) -> None:
    weights = torch.randn(5, 4 * fmt.block_size, generator=torch.Generator().manual_seed(0))
    blocks = fmt.quantize(weights)
    assert blocks.dtype == torch.uint8 and blocks.shape == (5, fmt.row_bytes(weights.shape[1]))
    assert torch.equal(fmt.pack(*fmt.unpack(blocks)), blocks)
    again = fmt.dequantize(blocks)
    assert torch.equal(fmt.unpack(blocks)[1].values(fmt.unpack(blocks)[0]), again)


@pytest.mark.parametrize("fmt", FLOATS, ids=repr)
def test_floats_are_casts(fmt: BlockFormat) -> None:
    weights = torch.tensor([[0.0, -0.0, 1.5, -3e-5, 6e4, 1e30]])
    stored = fmt.dequantize(fmt.quantize(weights))
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[fmt.name]
    assert torch.equal(stored[:, :5], weights[:, :5].to(dtype).float())
    assert bool(torch.isfinite(stored).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
@pytest.mark.parametrize("edge", EDGES)
def test_degenerate_blocks_are_normal_input(fmt: BlockFormat, edge: str, device: str) -> None:
    weights = EDGES[edge][None].to(device)
    stored = fmt.dequantize(fmt.quantize(weights))
    assert bool(torch.isfinite(stored).all())
    if edge in ("zeros", "constant", "alternating"):
        # Powers of two, and codebooks that lack −level for some level, cannot hit every constant.
        coarse = fmt.name.startswith(("MX", "NV", "IQ4"))
        assert float((stored - weights).abs().max()) <= (0.15 if coarse else 1e-3) * float(weights.abs().max())
    with_weights = fmt.dequantize(fmt.quantize(weights, torch.zeros(256, device=device)))
    assert bool(torch.isfinite(with_weights).all())


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_nearest_is_nearest(fmt: BlockFormat) -> None:
    """No other value that the grid holds in that column is closer."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 256, generator=generator) ** 3
    grid = fmt.fit(weights)
    chosen = (grid.values(grid.nearest(weights)) - weights).abs()
    others = grid.values(grid.nearest(torch.randn(2000, 256, generator=generator) * 2))
    assert len(others.unique(dim=0)) > 1
    assert bool((chosen <= (others - weights).abs() * (1 + 1e-5) + 1e-6 * weights.abs().max()).all())


@given(row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_nearest_is_nearest_for_any_numbers(row: list[float]) -> None:
    fmt = FORMATS["Q4_0"]
    weights = torch.tensor([row])
    grid = fmt.fit(weights)
    chosen = (grid.values(grid.nearest(weights)) - weights).abs()
    for code in range(-8, 8):
        other = (grid.values(torch.full_like(weights, code).to(torch.int8)) - weights).abs()
        assert bool((chosen <= other + 1e-5 * weights.abs().max()).all())


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_the_unit_of_importance_is_no_matter(fmt: BlockFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, importance = torch.randn(16, 256, generator=generator), torch.rand(256, generator=generator)
    expected = fmt.quantize(weights, importance)
    assert torch.equal(fmt.quantize(weights, importance * 2.0**-40), expected)
    assert torch.equal(fmt.quantize(weights, importance * 2.0**40), expected)


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
@pytest.mark.parametrize("senseless", [0.0, math.inf, math.nan])
def test_senseless_importance_weighs_alike(fmt: BlockFormat, senseless: float) -> None:
    """All of it, or that of half of the groups: the rounding stays about as good as without any."""
    weights = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.full((512,), senseless)
    plain = (fmt.dequantize(fmt.quantize(weights)) - weights).square().sum()
    assert (fmt.dequantize(fmt.quantize(weights, importance)) - weights).square().sum() <= plain * 1.01
    importance[:256] = 1.0
    half = (fmt.dequantize(fmt.quantize(weights, importance)) - weights).square()
    assert half.sum() <= plain * 1.01


@pytest.mark.parametrize("fmt", [*BLOCKS, *FLOATS], ids=repr)
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(fmt: BlockFormat, damage: float) -> None:
    weights = torch.zeros(1, 256)
    weights[0, 7] = damage
    with pytest.raises(FormatError, match="hold NaN or infinity"):
        fmt.quantize(weights)


@pytest.mark.parametrize(
    ("name", "elements", "expected"),
    [  # OCP Microscaling Formats (MX) Specification 1.0, tables of element types; E8M0 127 is 1
        ("MXFP4", [0x1, 0x2, 0x5, 0x7, 0xF], [0.5, 1.0, 3.0, 6.0, -6.0]),
        ("MXFP6_E2M3", [0b000001, 0b000111, 0b001000, 0b011111, 0b111111], [0.125, 0.875, 1.0, 7.5, -7.5]),
        ("MXFP6_E3M2", [0b000001, 0b000011, 0b001100, 0b011111, 0b111111], [0.0625, 0.1875, 1.0, 28.0, -28.0]),
        ("MXFP8_E4M3", [0x01, 0x38, 0x7E, 0xFE], [2.0**-9, 1.0, 448.0, -448.0]),
        ("MXFP8_E5M2", [0x01, 0x3C, 0x7B, 0xFB], [2.0**-16, 1.0, 57344.0, -57344.0]),
        ("MXINT8", [0x40, 0x01, 0x7F, 0xC0], [1.0, 2.0**-6, 127 / 64, -1.0]),
    ],
)
@pytest.mark.parametrize("exponent", [0, 127, 130])
def test_microscaling_elements_are_the_specifications(
    name: str, elements: list[int], expected: list[float], exponent: int
) -> None:
    """Built byte by byte: E8M0, then 32 elements as a little-endian stream of bits (MXFP4: halves of the block)."""
    fmt = FORMATS[name]
    elements = (elements * 32)[:32]
    bits = 8 * (fmt.block_bytes - 1) // 32
    if name == "MXFP4":
        data = [low | high << 4 for low, high in zip(elements[:16], elements[16:], strict=True)]
    else:
        data = list(sum(element << bits * i for i, element in enumerate(elements)).to_bytes(bits * 4, "little"))
    block = torch.tensor([[exponent, *data]], dtype=torch.uint8)
    wanted = torch.tensor((expected * 32)[:32], dtype=torch.float64) * 2.0 ** (exponent - 127)
    assert torch.equal(fmt.dequantize(block)[0].double(), wanted)
    if name != "MXFP4":  # ggml reads 2¹²⁸ there
        block[0, 0] = 255
        assert bool(fmt.dequantize(block).isnan().all())


def test_integer_grids_are_their_bytes() -> None:
    """fp32 scale, and where asymmetric a zero point, then codes, low bits first."""
    fmt = IntegerGrid(4, 32, symmetric=True)
    weights = torch.arange(-8, 8).repeat(2).float()[None] * 0.5
    codes, grid = fmt.unpack(fmt.quantize(weights))
    assert torch.equal(grid.values(codes), weights)
    assert float(grid.scale.abs()) == 0.5


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_importance_moves_the_error(fmt: BlockFormat) -> None:
    torch.manual_seed(0)
    weights, importance = torch.randn(64, 256), torch.rand(256) ** 6
    plain, weighted = (
        ((fmt.dequantize(fmt.quantize(weights, each)) - weights).square() * importance).sum()
        for each in (None, importance)
    )
    # Scales that are powers of two of eight-bit floats hardly leave a choice.
    assert weighted <= plain if fmt.name.startswith("MXFP8") else weighted < plain


@pytest.mark.parametrize("size", [1e-6, 3e-3, 0.02, 1.0, 700.0, 1e9])
def test_nvfp4_with_a_tensor_scale_is_as_good_at_any_size(size: float) -> None:
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    fmt = FORMATS["NVFP4"]
    scale = fmt.tensor_scale(weights * size)
    assert scale == 1.0 if size == 1.0 else scale > 0 and math.log2(scale).is_integer()
    stored = fmt.dequantize(fmt.quantize(weights * size / scale)) * scale / size
    assert float((stored - weights).square().mean()) < 0.0072  # .0068 where UE4M3 fits best


def test_signed_scales_beat_conventions() -> None:
    """Mean squared error of Q4_0 on Gaussian blocks: .00740 for ggml's signed max / −8; .00656 is possible."""
    weights = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    fmt = FORMATS["Q4_0"]
    assert float((fmt.dequantize(fmt.quantize(weights)) - weights).square().mean()) < 0.00660


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "NVFP4"])
def test_a_refitted_sub_block_suits_its_weights_better(name: str) -> None:
    """The others and what the super-block shares stay; the result is as storable as before."""
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(0)
    weights, importance = torch.randn(64, 256, generator=generator), torch.rand(256, generator=generator)
    grid = fmt.fit(weights, importance)
    size, group = grid.group, 3
    columns = slice(group * size, (group + 1) * size)
    moved = weights + 0.3 * torch.randn(64, 256, generator=generator)
    fresh = fmt.refit(grid, group, moved[:, columns], importance[columns])

    def errors(of: Grid) -> torch.Tensor:
        return ((of.values(of.nearest(moved)) - moved).square() * importance)[:, columns].sum(1)

    assert bool((errors(fresh) <= errors(grid) * (1 + 1e-6)).all()) and errors(fresh).sum() < 0.97 * errors(grid).sum()
    others = torch.arange(grid.scale.shape[1]) != group
    assert torch.equal(fresh.scale[:, others], grid.scale[:, others])
    codes = fresh.nearest(moved)
    assert torch.equal(fmt.dequantize(fmt.pack(codes, fresh)), fresh.values(codes))


def test_a_format_without_sub_blocks_has_nothing_to_refit() -> None:
    weights = torch.randn(2, 32)
    grid = FORMATS["Q4_0"].fit(weights)
    assert FORMATS["Q4_0"].refit(grid, 0, weights) is grid


@pytest.mark.parametrize("fmt", BLOCKS, ids=repr)
def test_rows_must_divide(fmt: BlockFormat) -> None:
    with pytest.raises(FormatError, match=f"{fmt.block_size + 1} weights do not divide"):
        fmt.quantize(torch.zeros(1, fmt.block_size + 1))


def test_joined_grids_equal_a_fit_of_the_whole() -> None:
    weights = torch.randn(3, 96)
    fmt = FORMATS["Q4_0"]
    parts = Grid.joined([fmt.fit(part) for part in weights.split(32, dim=1)])
    whole = fmt.fit(weights)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(fmt.pack(parts.nearest(weights), parts), fmt.quantize(weights))


def test_formats_are_found_by_name() -> None:
    for name, fmt in FORMATS.items():
        assert find_format(name, 256) is fmt
    for name, found in (
        ("INT4_G128", IntegerGrid(4, 128)),
        ("UINT3", IntegerGrid(3, 576, symmetric=False)),
        ("TERNARY_G64", TernaryGrid(64)),
        ("TERNARY", TernaryGrid(576)),
        ("DINT4_G32", DenormalGrid(4, 32)),
        ("DINT3", DenormalGrid(3, 576)),
    ):
        grid = find_format(name, 576)
        assert (grid.name, grid.block_size, type(grid)) == (found.name, found.block_size, type(found))
    for wrong in ("INT5", "INT4_G", "int4", "UTERNARY", "Q4_0_G64", "INT3_G4", "DINT2"):
        with pytest.raises(FormatError):
            find_format(wrong, 576)


def test_denormals_are_halves_of_the_step() -> None:
    """dINT: as many levels as codes, all integers but ±½."""
    for bits in (3, 4, 8):
        levels = DenormalGrid(bits, 64).levels.levels
        assert len(levels) == len(set(levels)) == 2**bits
        assert sorted(level for level in levels if level % 1) == [-0.5, 0.5]
        assert (min(levels), max(levels)) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 2)


def test_a_codebooks_tables_are_the_same_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is first to need them: compiled loops of one may be reading what another finds."""
    made = block_module._cells

    def slowly(*given: Any) -> block_module.Cells:
        time.sleep(0.05)
        return made(*given)

    monkeypatch.setattr(block_module, "_CELLS", {})
    monkeypatch.setattr(block_module, "_cells", slowly)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: block_module.cells((-1.0, 0.0, 2.0), torch.device("cpu")), range(4))
    assert all(each is first for each in others)
