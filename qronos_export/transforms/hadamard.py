"""Orthogonal matrices that spread outliers: Hadamard matrices where they are known, random ones elsewhere.

Sylvester's doubling H_2n = [[H, H], [H, −H]] starts at Paley's constructions from quadratic residues (1933): order
q + 1 for primes q ≡ 3 mod 4 and 2(q + 1) for primes q ≡ 1 mod 4. Usual hidden sizes have one: 576 = 36 · 16,
5120 = 20 · 256, 11008 = 2 · 5504.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A matrix of ±1 with orthogonal rows, float64 [order, order]; None where neither construction gives one."""
    doublings = (order & -order).bit_length() - 1
    for left in range(doublings, -1, -1):
        base = _paley(order >> left)
        if base is None:
            continue
        for _ in range(left):
            base = torch.cat([torch.cat([base, base], dim=1), torch.cat([base, -base], dim=1)])
        return base
    return None


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A seeded orthogonal matrix, float64 [size, size]: a Hadamard matrix with random signs (arXiv 2404.00456), or one
    drawn uniformly where there is none of this order."""
    matrix = hadamard(size)
    if matrix is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return signs[:, None] * matrix / size**0.5
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _paley(order: int) -> Tensor | None:
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    if _prime(order - 1):  # ≡ 3 mod 4, as the order divides by four
        core = _bordered(order - 1, antisymmetric=True)
        return core + torch.eye(order, dtype=torch.float64)
    if _prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        core = _bordered(order // 2 - 1, antisymmetric=False)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(torch.eye(order // 2, dtype=torch.float64), minus)
    return None


def _bordered(q: int, *, antisymmetric: bool) -> Tensor:
    """Paley's conference matrix: quadratic characters of differences mod q, bordered with ones [q + 1, q + 1]."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    numbers = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(numbers[:, None] - numbers[None, :]) % q]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = -1.0 if antisymmetric else 1.0
    return matrix


def _prime(number: int) -> bool:
    return number > 2 and all(number % k for k in (2, *range(3, math.isqrt(number) + 1, 2)))
