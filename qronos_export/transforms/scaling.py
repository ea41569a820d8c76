"""Scales between a norm and the matrices that read it, between v and o, and between up and down.

Column j of what reads is multiplied by s_j and what feeds it divided by s_j: the product stays, the rounding changes.

    smoothquant  s_j = max|x_j|^a / max|w_j|^(1 − a), a = 1/2           arXiv 2211.10438
    awq          s_j = rms(x_j)^a, the a of 20 with the least ‖(Q(Ws)/s − W) X‖²   arXiv 2306.00978
    aqas         s as smoothquant's, the a of 20 with the least ‖Q(Ws) Q(x/s) − Wx‖²   arXiv 2311.05161
    equalize     s_j = c_j^a / rms(w_j)^b, the a and b with the least Σ c_j ((Q(Ws)/s − W)_j)² + ‖W (Q(x/s) s − x)‖²

equalize is ours. A block has one scale, so columns of one size round best (b = 1, as DFQ's equalization, arXiv
1906.04721, but among the inputs of one layer). c_j = 1/U_jj² is what an error of column j costs once error diffusion
has had later columns make up for it: its input's variance given theirs. The second term is what the runtime's rounding
of the inputs adds.

Q rounds weights to the artifact's format, and inputs as the run will: to the recipe's `activations`, or as llama.cpp
does where it names none. The identity is always among the candidates, so a search never makes its own objective worse.
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from formats import FORMATS, BlockFormat, FormatError, find_format
from qronos_export.activations import activation
from qronos_export.errors import TransformError
from qronos_export.rounding.least_squares import conditional_variance
from qronos_export.transforms.anatomy import Anatomy, Norm, Pair
from qronos_export.transforms.transform import Goal, Inputs, InputStats, Transform

STEPS = 20
_ROWS = 1024  # for a search that needs no more
_SMALLEST_BLOCK = 32
_A = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_B = (0.0, 0.5, 0.75, 0.9, 1.0, 1.1)
Candidate = TypeVar("Candidate")


class Scaling(Transform):
    """Finds factors for every place of a block that can take them. Subclasses say which."""

    needs_inputs = True

    def __init__(self, goal: Goal) -> None:
        self._format, self._ranks = goal.format, goal.ranks
        self._activations = "llama.cpp" if goal.activations == "none" else goal.activations

    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        for norm in anatomy.norms:
            known = next((inputs[r.name] for r in norm.readers if r.name in inputs), None)
            if known is not None:
                scale_norm(norm, self._factors([r.weight.float() for r in norm.readers], known))
        for pair in anatomy.pairs:
            if pair.is_linear and pair.second.name in inputs:
                scale_pair(pair, self._factors([pair.second.weight.float()], inputs[pair.second.name], pair.copies))

    def _factors(self, weights: list[Tensor], inputs: InputStats, copies: Tensor | None = None) -> Tensor:
        """s [inputs]; `copies` are inputs that share theirs. Ones where no block divides the rows: these stay float."""
        if len(inputs.largest) % _SMALLEST_BLOCK:
            return torch.ones_like(inputs.largest)
        if not bool(torch.isfinite(inputs.hessian).all()):
            raise TransformError("inputs of a layer overflow on the calibration text")
        return self.factors(weights, inputs, lambda s: s if copies is None else shared(s, copies))

    def _best(self, candidates: Sequence[Candidate], error: Callable[[Candidate], float]) -> Candidate:
        """The first of those with the least error."""
        errors = self._ranks.values(error, candidates)
        return candidates[errors.index(min(errors))]

    def _arriving(self, x: Tensor) -> Tensor:
        """Inputs [tokens, features] as a matrix of the artifact's format gets them."""
        rounding = activation(self._activations, search_format(self._format, x.shape[1]))
        return rounding(x) if rounding else x

    @abstractmethod
    def factors(self, weights: list[Tensor], inputs: InputStats, share: Callable[[Tensor], Tensor]) -> Tensor:
        """Factors for the columns of all `weights` [out, in]; `share` makes equal what must be, [in] → [in]."""


def scale_norm(norm: Norm, factors: Tensor) -> None:
    """Divide what `norm` returns by `factors` [hidden], and make up for it in its readers."""
    factors = factors.double()
    norm.set_gain(norm.gain / factors)
    if norm.bias is not None:
        norm.bias.copy_(norm.bias.double() / factors)
    for reader in norm.readers:
        reader.map_inputs(factors)


def scale_pair(pair: Pair, factors: Tensor) -> None:
    """Multiply the columns of `pair.second` by `factors` [its inputs], and make up for it in `pair.first`."""
    pair.scale(factors.double()[pair.copies[:, 0]])


def shared(factors: Tensor, copies: Tensor) -> Tensor:
    """The geometric mean over columns that one row feeds."""
    result = factors.clone()
    result[copies] = factors[copies].log().mean(1, keepdim=True).exp().expand(copies.shape)
    return result


class SmoothQuant(Scaling):
    """Loud inputs made quieter by half of what they exceed the weights that read them, without a search (arXiv
    2211.10438)."""

    def factors(self, weights: list[Tensor], inputs: InputStats, share: Callable[[Tensor], Tensor]) -> Tensor:
        return share(_smooth(weights, inputs, 0.5))


class AWQ(Scaling):
    """A power of the inputs' root mean square, by the output error of rounded weights on float inputs (arXiv
    2306.00978)."""

    def factors(self, weights: list[Tensor], inputs: InputStats, share: Callable[[Tensor], Tensor]) -> Tensor:
        power = inputs.hessian.diagonal()
        rms = power.clamp(min=float(power.mean()) * 1e-8 + 1e-30).sqrt()

        def error(s: Tensor) -> float:
            return sum(_weight_error(weight, s, inputs.hessian, self._format) for weight in weights)

        return self._best([share(_centred(rms ** (step / STEPS))) for step in range(STEPS)], error)


class Equalize(Scaling):
    """Columns of like size, but for those whose error costs much: by what error feedback leaves of the rounding of
    weights, and what the rounding of inputs adds. Ours; looks at 1024 rows at most."""

    def factors(self, weights: list[Tensor], inputs: InputStats, share: Callable[[Tensor], Tensor]) -> Tensor:
        step = -(-sum(map(len, weights)) // _ROWS)
        some = torch.cat([weight[::step] for weight in weights])
        cost = conditional_variance(inputs.hessian, 3e-2, "blocks", _SMALLEST_BLOCK)
        rms = some.square().mean(0).clamp(min=1e-20).sqrt()

        def factors(a: float, b: float) -> Tensor:
            return share(_centred(cost**a / rms**b))

        @functools.cache
        def error(a: float, b: float) -> float:
            s = factors(a, b)
            rounding = _rounded(some * s, self._format, inputs.hessian.diagonal() / s.square()) / s - some
            x = inputs.sample / s
            noise = (self._arriving(x) - x).square().mean(0) * s.square()
            return float((rounding.square() @ cost).sum() + (some.square() @ noise).sum())

        a = 0.0
        b = self._best(_B, lambda b: error(a, b))
        a = self._best(_A, lambda a: error(a, b))
        b = self._best(_B, lambda b: error(a, b))
        return factors(a, b)


class AQAS(Scaling):
    """SmoothQuant's factors with the power searched, by the output error of rounded weights on rounded inputs (arXiv
    2311.05161)."""

    def factors(self, weights: list[Tensor], inputs: InputStats, share: Callable[[Tensor], Tensor]) -> Tensor:
        def error(s: Tensor) -> float:
            rounded = self._arriving(inputs.sample / s)
            return sum(
                float((rounded @ _rounded(weight * s, self._format).T - inputs.sample @ weight.T).square().sum())
                for weight in weights
            )

        candidates = [share(_smooth(weights, inputs, step / STEPS)) for step in range(1, STEPS)]
        return self._best([torch.ones_like(candidates[0]), *candidates], error)


def _smooth(weights: list[Tensor], inputs: InputStats, migration: float) -> Tensor:
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return _centred(inputs.largest.clamp(min=1e-5) ** migration / largest.clamp(min=1e-5) ** (1 - migration))


def _centred(factors: Tensor) -> Tensor:
    """Scaled to a geometric mean of one; what a format's blocks share is no matter of a common factor."""
    return factors / factors.log().mean().exp()


def _weight_error(weight: Tensor, s: Tensor, hessian: Tensor, format: str) -> float:
    error = _rounded(weight * s, format, hessian.diagonal() / s.square()) / s - weight
    return float(torch.linalg.vecdot(error @ hessian, error).sum())


def _rounded(weight: Tensor, format: str, importance: Tensor | None = None) -> Tensor:
    fmt = search_format(format, weight.shape[1])
    return fmt.dequantize(fmt.quantize(weight, importance))


def search_format(name: str, columns: int) -> BlockFormat:
    """The type a search rounds to: by the artifact's name (Q4_K for Q4_K_M), or Q4_0 where its blocks do not divide."""
    for each in (name, name.rpartition("_")[0]):
        with contextlib.suppress(FormatError):
            fmt = find_format(each, columns)
            fmt.check(columns)
            return fmt
    return FORMATS["Q4_0"]
