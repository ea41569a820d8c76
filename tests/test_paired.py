"""Whether two files differ: laws of the statistics."""

from __future__ import annotations

import math
import random

import pytest

from qronos_export.errors import UsageError
from qronos_export.paired import LEVEL, adjusted, difference, student_t


@pytest.mark.parametrize(
    ("t", "freedom"),
    [(12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.228, 10), (2.131, 15), (2.023, 39), (1.984, 100)],
)
def test_students_t_is_the_one_in_tables(t: float, freedom: int) -> None:
    """Their 97.5 % quantiles, to the three decimals they have."""
    assert student_t(t, freedom) == pytest.approx(0.95, abs=2e-4)
    assert student_t(0, freedom) == 0


def test_what_chunks_have_in_common_is_no_error() -> None:
    hard = [random.Random(0).uniform(0, 10) for _ in range(20)]
    better = [each + (0.01 if index % 2 else 0.02) for index, each in enumerate(hard)]
    found = difference(better, hard)
    assert found.mean == pytest.approx(0.015)
    assert found.error == pytest.approx(0.005 * math.sqrt(20 / 19) / math.sqrt(20))
    assert found.p < 1e-9
    back = difference(hard, better)
    assert (back.mean, back.error, back.p) == pytest.approx((-found.mean, found.error, found.p))
    assert difference(hard, hard).p == 1


def test_chance_is_called_real_as_often_as_allowed() -> None:
    """Of 2000 pairs that do not differ, 5 % have p < 0.05; three standard errors of that share are 1.5 %."""
    drawn = random.Random(1)

    def chunks() -> list[float]:
        return [drawn.gauss(1, 1) for _ in range(6)]

    share = sum(difference(chunks(), chunks()).p < LEVEL for _ in range(2000)) / 2000
    assert share == pytest.approx(LEVEL, abs=0.015)


def test_many_questions_need_more_certainty() -> None:
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted([0.5, 0.9]) == [1.0, 1.0] and adjusted([0.04]) == [0.04] and adjusted([]) == []


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_chunks_that_are_not_pairs_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(UsageError, match=rf"Cannot compare {len(a)} chunks with {len(b)}"):
        difference(a, b)
