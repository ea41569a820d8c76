"""Qronos (arXiv 2505.11695): error correction from the float model's activations, then error diffusion.

The paper solves a least-squares problem after the first code. Equivalently: project once, V = W(G + λI)(H + λI)⁻¹, and
sweep V as GPTQ does; only the first code is chosen differently, from (w·G_:j − w_r·H_rj) / H_jj.
"""

from __future__ import annotations

from torch import Tensor

from formats import BlockFormat
from qronos_export.rounding.gptq import diffuse
from qronos_export.rounding.least_squares import SingularError, normal_equations
from qronos_export.rounding.rounded import Rounded, Settings
from qronos_export.rounding.rtn import rtn
from qronos_export.statistics import LayerStats


def qronos(weight: Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns] so that X̂q stays close to what the float model computes, Xw."""
    fmt.check(weight.shape[1])
    try:
        normal = normal_equations(stats, settings.damping, settings.order)
    except SingularError as error:
        return rtn(weight, stats, fmt, settings, note=f"{error}; rounded to nearest")
    target, mismatch = normal.project(weight, settings.shrinkage)
    j = 0 if normal.order is None else int(normal.order[0])
    drift = normal.cross[:, j] - normal.hessian[:, j]
    # w·G_β[:,j] − w_r·H[r,j] = w_j·H_jj + β·w·(G − H)[:,j]
    first = weight[:, j] + settings.shrinkage * (weight @ drift) / normal.hessian[j, j]
    return diffuse(target, normal, fmt, "qronos", mismatch, first)
