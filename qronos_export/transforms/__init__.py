"""Transforms: float in, float out; the function stays, the weights round better. One file and one line each.

They fold into the weights, so that what follows (calibration, files, llama.cpp) sees a normal checkpoint.
"""

from collections.abc import Callable

from qronos_export.transforms.permutation import Permute
from qronos_export.transforms.rotation import Hadamard, HadamardValues
from qronos_export.transforms.scaling import AQAS, AWQ, Equalize, SmoothQuant
from qronos_export.transforms.transform import InputStats, Outside, Transform

TRANSFORMS: dict[str, Callable[[str, int], Transform]] = {
    "hadamard": lambda format, seed: Hadamard(seed),
    "hadamard-r2": lambda format, seed: HadamardValues(seed),
    "smoothquant": lambda format, seed: SmoothQuant(format),
    "awq": lambda format, seed: AWQ(format),
    "aqas": lambda format, seed: AQAS(format),
    "equalize": lambda format, seed: Equalize(format),
    "permute": lambda format, seed: Permute(),
}
"""Name -> transform, from the format that weights will be rounded to and a seed."""

__all__ = ["TRANSFORMS", "InputStats", "Outside", "Transform"]
