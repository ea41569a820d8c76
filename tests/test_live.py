"""Counting what tensors take, and what the process does."""

from __future__ import annotations

import subprocess
import sys

import torch

from qronos_export.live import Live
from qronos_export.memory import peak_memory


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


def test_a_peak_is_the_processs_own() -> None:
    """Not that of the process which started it: getrusage would count a copy of that."""
    held = torch.ones(1 << 28)  # 1 GiB
    code = "from qronos_export.memory import peak_memory; print(peak_memory())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1 << 24 < found < held.nbytes * 0.9 and peak_memory() > held.nbytes
