"""What a rounder is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from formats import BlockFormat, QuantizedWeight
from qronos_export.rounding.coupled import Coupled
from qronos_export.statistics import LayerStats


@dataclass(frozen=True)
class Settings:
    """What the user may turn, and how rows hang together; each rounder reads what concerns it.

    damping:    α in λ = α · mean(diag H).
    shrinkage:  β in V = W + βW(G − H)(H + ρI)⁻¹; 1 trusts the measured mismatch of the streams fully, 0 is GPTQ.
    magr:       MagR's α, in units of each row's root mean square; 0 leaves the weights. Done before the rounder.
    order:      natural, descending (by diag H), blocks: heavy blocks first, and in them heavy columns, or min_pivot.
    dither:     seed of stochastic rounding; None rounds to nearest.
    refine:     rounds of new scales and coordinate descent after the sweep.
    held_out:   choose damping and shrinkage anew for every group of layers, on tokens held out.
    ridge:      ρ / mean(diag H) there; None for ρ = λ.
    coupled:    rows of the weight at hand whose errors meet in a product; those who call a rounder know.
    """

    damping: float
    shrinkage: float
    order: str
    magr: float = 0.0
    dither: int | None = None
    refine: int = 0
    held_out: bool = False
    ridge: float | None = None
    coupled: Sequence[Coupled] = ()


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what is known about it.

    loss:      per row, (T − Q)(H + λI)(T − Q)ᵀ with T the rounder's target: W for rtn, gptq and gpfq, the least-squares
               weights for qronos. In squared output units per token. [rows]
    mismatch:  per row, the squared output error caused by X̂ ≠ X that weights can undo (recoverable mismatch). [rows]
    """

    weight: QuantizedWeight
    loss: Tensor
    mismatch: Tensor | None
    damping: float
    method: str
    note: str = ""


Rounder = Callable[[Tensor, LayerStats, BlockFormat, Settings], Rounded]
