"""Counting what tensors take."""

from __future__ import annotations

import torch

from qronos_export.live import Live


def test_counts_each_memory_once_until_it_is_freed() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        view = a.view(10, 100)[3:]
        assert live.now == 4000
        b = a + 1
        assert live.now == live.peak == 8000
        del a
        assert live.now == 8000  # the view holds it
        del view, b
        assert live.now == 0
        (torch.zeros(500) + 1).sum()
    assert live.peak == 8000


def test_in_place_takes_nothing() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        a.add_(1).mul_(2)
    assert live.peak == 4000
