"""Where to compute, and how exactly."""

from __future__ import annotations

import pytest
import torch

from qronos_export.device import pick_device
from qronos_export.errors import UsageError


def test_products_are_in_float32_whatever_was_set() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        pick_device("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="--device cuda:99 is not available here"):
        pick_device("cuda:99")
    with pytest.raises(UsageError, match="--device gpu is not available here"):
        pick_device("gpu")
