"""Where to compute, and how exactly."""

from __future__ import annotations

import torch

from qronos_export.errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. Raises UsageError for a device torch does not have.

    From then on products of float32 are computed in float32, whatever was set before: TF32 has 10 bits, too few for H.
    """
    torch.set_float32_matmul_precision("highest")
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
