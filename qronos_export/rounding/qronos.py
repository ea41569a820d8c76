"""Qronos (arXiv 2505.11695): error correction from the float model's activations, then error diffusion.

The paper solves a least-squares problem after the first code. Equivalently: project once, V = W(G + λI)(H + λI)⁻¹, and
sweep V as GPTQ does; only the first code is chosen differently, from (w·G_:j − w_r·H_rj) / H_jj.

G − H is the noisier the fewer tokens there are, and what it asks of directions in which X̂ hardly varies is mostly
noise. So the correction has a ridge ρ of its own, V = W + βW(G − H)(H + ρI)⁻¹, far above λ; ρ = λ is the paper's.

What a layer adds to the residual stream may make up for what that stream is off by already as well (LoaQ, arXiv
2509.06297): ‖XWᵀ + R − X̂Qᵀ − R̂‖² instead of ‖XWᵀ − X̂Qᵀ‖² puts D = (R − R̂)ᵀX̂ beside W(G − H).
"""

from __future__ import annotations

from torch import Tensor

from formats import BlockFormat
from qronos_export.rounding.gptq import calibrated, diffuse
from qronos_export.rounding.least_squares import Normal
from qronos_export.rounding.rounded import Rounded, Settings


@calibrated
def qronos(weight: Tensor, normal: Normal, fmt: BlockFormat, settings: Settings) -> Rounded:
    """Round `weight` [rows, columns] so that X̂q stays close to what the float model computes, Xw."""
    target, mismatch = normal.project(weight, settings.shrinkage, settings.ridge)
    j = 0 if normal.order is None else int(normal.order[0])
    drift = normal.cross[:, j] - normal.hessian[:, j]
    # w·G_β[:,j] − w_r·H[r,j] = w_j·H_jj + β·w·(G − H)[:,j]
    power = normal.hessian[j, j] + (settings.ridge or 0.0) * normal.unit
    asked = weight @ drift if normal.residual is None else weight @ drift + normal.residual[:, j]
    first = weight[:, j] + settings.shrinkage * asked / power
    return diffuse(target, normal, fmt, "qronos", mismatch, settings, first)
