"""Groups of layers that do not read one another are rounded side by side, as each would be alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from formats import BlockFormat
from qronos_export.artifact.gguf import StoredTensor, Target
from qronos_export.calibration import Group, Matrix
from qronos_export.layers import round_groups, together
from qronos_export.plan import Mix
from qronos_export.rounding import ROUNDERS, Settings
from qronos_export.statistics import LayerStats

EXPERTS, ROWS, COLUMNS = 5, 48, 64


class Tensors:
    """Every weight is a tensor of its own name; keeps the blocks."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def claim(self, weights: Mapping[str, Tensor]) -> None:
        raise AssertionError("nothing is matched here")

    def forget(self) -> None:
        raise AssertionError("nothing is matched here")

    def targets(self, name: str) -> list[Target]:
        return [Target(name, name, torch.arange(ROWS), torch.arange(ROWS))]

    def tensor(self, target: Target) -> StoredTensor:
        return StoredTensor(target.tensor, "F32", (ROWS, COLUMNS), 0, 4 * ROWS * COLUMNS)

    def may_have_scale(self, tensor: str) -> bool:
        return False

    def put(
        self, tensor: StoredTensor, fmt: BlockFormat, file_rows: Tensor, blocks: Tensor, values: Tensor, scales: Tensor
    ) -> None:
        self.blocks[tensor.name] = blocks


def experts() -> Iterator[Group]:
    generator = torch.Generator().manual_seed(0)
    for number in range(EXPERTS):
        x, noise = torch.randn(2, 300, COLUMNS, generator=generator)
        stats = LayerStats(COLUMNS)
        stats.update(x, x + 0.1 * noise)
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        yield Group([Matrix(f"expert {number}", weight, torch.empty_like(weight))], stats)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_experts_side_by_side_are_rounded_as_alone(threads: int) -> None:
    names = [f"expert {number}" for number in range(EXPERTS)]
    mix = Mix("Q4_0", 0, dict.fromkeys(names, "Q4_0"), names, {})
    settings = Settings(3e-2, 1.0, "blocks", ridge=0.5)

    def rounded(groups: list[Group]) -> tuple[list[str], Tensor]:
        tensors = Tensors()
        reports = [each.name for each in round_groups(groups, tensors, mix, ROUNDERS["qronos"], settings, tensors)]
        assert list(tensors.blocks) == reports
        return reports, torch.stack([group.matrices[0].quantized for group in groups])

    whole = rounded(list(experts()))
    assert torch.equal(whole[1], rounded(list(experts()))[1])
    alone = [rounded([group]) for group in experts()]
    assert whole[0] == names == [report for reports, _ in alone for report in reports]
    assert torch.get_num_threads() == threads
    off = (whole[1] != torch.cat([values for _, values in alone])).float().mean()
    assert off == 0 if threads == 1 else off < 0.01  # alone, torch sums in another order on several threads


def test_how_many_go_together(threads: int) -> None:
    """As many as there are threads; not so few that some idle, nor so large that memory would not do."""
    cpu = torch.device("cpu")
    assert together(64, 576, cpu) == threads
    assert together(threads - 1, 576, cpu) == 1
    assert together(64, 14336, cpu) == 1
    assert together(64, 576, torch.device("cuda")) == 1


def test_what_outputs_are_added_to_has_the_tensors_scale() -> None:
    """NVFP4 divides a large tensor by a scale of its own: weights and D four times as large, the same blocks."""

    class Scaled(Tensors):
        def may_have_scale(self, tensor: str) -> bool:
            return True

    mix, settings = Mix("NVFP4", 0, {"o": "NVFP4"}, ["o"], {}), Settings(3e-2, 1.0, "blocks", ridge=0.5)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 300, COLUMNS, generator=generator)
    weight, gap = torch.randn(ROWS, COLUMNS, generator=generator), x[:, :ROWS] + noise[:, :ROWS]

    def blocks(times: float, *, gap: Tensor | None = gap) -> Tensor:
        stats = LayerStats(COLUMNS, written=0 if gap is None else ROWS)
        stats.update(x, x + 0.1 * noise, None if gap is None else times * gap)
        tensors, given = Scaled(), times * weight
        group = Group([Matrix("o", given, torch.empty_like(given))], stats)
        (report,) = round_groups([group], tensors, mix, ROUNDERS["qronos"], settings, tensors)
        assert report.residual == (gap is not None)
        return tensors.blocks["o"]

    assert torch.equal(blocks(2.0**14), blocks(2.0**16))
    assert not torch.equal(blocks(1.0), blocks(1.0, gap=None))
