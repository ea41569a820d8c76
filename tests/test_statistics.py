"""H and G are means over tokens, whatever the batching."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from qronos_export.statistics import LayerStats


@given(
    tokens=st.integers(1, 60),
    features=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    seed=st.integers(0, 100),
)
def test_batching_does_not_matter(tokens: int, features: int, cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, x_hat = torch.randn(2, tokens, features, generator=generator)
    stats = LayerStats(features)
    edges = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    for start, stop in pairwise(edges):
        stats.update(x[start:stop], x_hat[start:stop])
    assert stats.tokens == tokens
    torch.testing.assert_close(stats.hessian, (x_hat.T @ x_hat) / tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.cross, (x.T @ x_hat) / tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)


def test_low_precision_inputs_accumulate_in_float32() -> None:
    x = torch.randn(500, 16).to(torch.bfloat16)
    stats = LayerStats(16)
    for part in x.split(7):
        stats.update(part, part)
    exact = x.double().T @ x.double() / 500
    torch.testing.assert_close(stats.hessian.double(), exact, rtol=1e-5, atol=1e-6)
