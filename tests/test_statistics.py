"""H and G are means over tokens, whatever the batching."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qronos_export import precision
from qronos_export.statistics import LayerStats
from tests.devices import DEVICES


@settings(deadline=None)  # the first product of a process sets things up
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


def test_the_order_of_batches_does_not_show() -> None:
    """Nor who adds which, nor that moments were asked for in between."""
    batches = torch.randn(12, 2, 40, 24)
    found = []
    for order, asked in ((range(12), False), (torch.randperm(12).tolist(), False), (range(11, -1, -1), True)):
        stats, other = LayerStats(24), LayerStats(24)
        for number in order:
            (stats if number % 3 else other).update(*batches[number], held=number % 2 == 0)
            if asked:
                stats.settle()
        stats.borrow(other, other.tokens)
        found.append(stats.settle())
    for first, second, third in zip(*found, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_inputs_accumulate_in_float32(device: str) -> None:
    x = torch.randn(500, 16, device=device).to(torch.bfloat16)
    stats = LayerStats(16, device)
    for part in x.split(7):
        stats.update(part, part)
    exact = x.double().T @ x.double() / 500
    torch.testing.assert_close(stats.hessian.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.cross.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whose", [*(["onednn"] if torch.backends.mkldnn.is_available() else []), "torch"])
def test_products_are_of_whole_float32(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes them: of 12-bit inputs, which bfloat16 could not hold, nothing is lost but in the sum."""
    if whose == "torch":
        monkeypatch.setattr(precision, "_onednn", lambda: None)
    assert (precision._onednn() is not None) == (whose == "onednn")
    a, b = torch.randint(-2048, 2048, (2, 3, 200, 96)).float() / 2048
    found = precision.product(a, b[0])
    torch.testing.assert_close(found, (a.double() @ b[0].double().T).float(), rtol=1e-6, atol=3e-6)
    bias = torch.randn(200)
    torch.testing.assert_close(precision.linear("float32")(a, b[0], bias), found + bias)


def test_products_have_gradients_where_asked_for() -> None:
    a, b = torch.randn(128, 96, requires_grad=True), torch.randn(128, 96)
    precision.product(a, b).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.sum(0).expand_as(a))
