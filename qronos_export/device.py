"""Where to compute."""

from __future__ import annotations

import torch

from qronos_export.errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. Raises UsageError for a device torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} is not available here ({str(error).splitlines()[0]}); try auto or cpu."
        ) from error
    return device
