"""What a file loses on each chunk of a text, and whether two files that read the same chunks differ.

Chunks are hard or easy for all files alike, so the difference of two files varies less from chunk to chunk than either
does. Its mean over n chunks, all of one size, is the difference of the files; its standard error is the deviation of
the n differences over √n, and nothing need be assumed of tokens within a chunk, which depend on one another. Chunks are
taken as independent of one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from qronos_export.errors import UsageError

LEVEL = 0.05  # of error that is allowed over all differences that are asked about at once


@dataclass(frozen=True)
class Chunks:
    """Means over the scored tokens of each chunk, in order: nats of loss and of divergence, percent of same tops."""

    loss: list[float]
    kl_divergence: list[float]
    same_top: list[float]


@dataclass(frozen=True)
class Difference:
    """`mean` of the differences and its standard `error`; `p` is how probable a mean so far from zero would be if the
    files did not differ, by Student's t, both sides."""

    mean: float
    error: float
    p: float


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of `a` − `b`, values of the same chunks. Raises UsageError for less than two chunks."""
    if len(a) != len(b) or len(a) < 2:
        raise UsageError(f"Cannot compare {len(a)} chunks with {len(b)}; expected the same ones, two or more.")
    each = [x - y for x, y in zip(a, b, strict=True)]
    mean, error = fmean(each), stdev(each) / math.sqrt(len(each))
    if error == 0:
        return Difference(mean, error, float(mean == 0))
    return Difference(mean, error, 1 - student_t(abs(mean) / error, len(each) - 1))


def student_t(t: float, freedom: int) -> float:
    """P(|T| < t) with that many degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4, exact."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range(odd, freedom - 1, 2):  # cosθ + 2/3 cos³θ + …, or 1 + 1/2 cos²θ + …
        total += term
        term *= (step + 1) / (step + 2) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def adjusted(p: Sequence[float]) -> list[float]:
    """Holm's: each as if it were the only one asked about, so that those below LEVEL are all real but for that
    probability. Scand. J. Statist. 6 (1979), 65."""
    found, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        found[index] = least
    return found
