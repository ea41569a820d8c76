"""Transforms: float in, float out; the function stays, the weights round better. One file and one line each.

They fold into the weights, so that what follows (calibration, files, llama.cpp) sees a normal checkpoint.
"""

from collections.abc import Callable

from qronos_export.transforms.permutation import Permute
from qronos_export.transforms.rotation import Hadamard, HadamardValues
from qronos_export.transforms.scaling import AQAS, AWQ, Equalize, SmoothQuant
from qronos_export.transforms.spinquant import SpinQuant
from qronos_export.transforms.transform import Goal, InputStats, Outside, Transform, Whole

TRANSFORMS: dict[str, Callable[[Goal], Transform]] = {
    "hadamard": lambda goal: Hadamard(goal.seed),
    "hadamard-r2": lambda goal: HadamardValues(goal.seed),
    "spinquant": SpinQuant,
    "smoothquant": SmoothQuant,
    "awq": AWQ,
    "aqas": AQAS,
    "equalize": Equalize,
    "permute": lambda goal: Permute(),
}
"""Name -> transform, from what it is for."""

__all__ = ["TRANSFORMS", "Goal", "InputStats", "Outside", "Transform", "Whole"]
