"""What a runtime rounds the inputs of its matrices to, so that the quantized stream can read the same.

    int8, int4     a scale and a zero point for each token, min and max on the codes' ends
    mxfp4, mxfp8   blocks of 32 under a power of two by the OCP Microscaling specification's rule; E2M1 and E4M3
    q8_0, q8_k     eight bits in blocks of 32 and 256, by ggml's own rules (formats/ggml_reference.py)
    llama.cpp      for each matrix what the CPU kernel for its type reads: q8_k for types with blocks of 256, q8_0 for
                   other quantized types, F16 and BF16 for these, what comes for F32

llama.cpp's CPU kernels do the last whether it is simulated or not, but for two details. Those for Q4_1 and Q5_1 read
q8_1, which has q8_0's codes, but multiply a block's offset with fp16(d Σq) instead of fp16(d) Σq: the two differ by
2⁻¹⁰ of themselves at most. Those for AVX and NEON round exact halves to even. Nothing that runs our files does the
first four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formats import FORMATS, BlockFormat
from formats.ggml_reference import bf16, f16, q8_0, q8_k
from formats.microscaling import MX
from qronos_export.errors import UsageError

Activation = Callable[[Tensor], Tensor]


def activation(name: str, fmt: BlockFormat) -> Activation | None:
    """What `name` does to the inputs of a matrix in `fmt`: rounds float [..., features] along the last dimension. A
    KeyError for names that are neither llama.cpp nor in ACTIVATIONS."""
    if name == "llama.cpp":
        if fmt.is_float:
            return _FLOATS[fmt.name]
        return q8_k if fmt.block_size == 256 else q8_0
    return ACTIVATIONS[name]


def check_activations(name: str, weight: str, columns: int) -> None:
    """Raises UsageError where inputs of `weight` do not divide into the blocks of `name`."""
    block = {"mxfp4": 32, "mxfp8": 32, "q8_0": 32, "q8_k": 256}.get(name, 1)
    if columns % block:
        raise UsageError(f"{weight} reads {columns} numbers, which blocks of {block} do not divide: no {name} there.")


def per_token(x: Tensor, bits: int) -> Tensor:
    """Integers under a scale and a zero point for each token."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp_(0, 2**bits - 1) - zero) * scale


def blocks_of_floats(x: Tensor, fmt: MX) -> Tensor:
    """2^(⌊log2 max|x|⌋ − emax) for each block of 32."""
    blocks = x.unflatten(-1, (-1, 32))
    _, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))
    scale = torch.ldexp(torch.full_like(blocks[..., :1], fmt.unit / 2), exponent - 1 - fmt.largest_exponent)
    return (fmt.levels.snap(blocks / scale) * scale).view_as(x)


def _mx(name: str) -> Activation:
    fmt = FORMATS[name]
    assert isinstance(fmt, MX)
    return lambda x: blocks_of_floats(x, fmt)


_FLOATS: dict[str, Activation | None] = {"F32": None, "F16": f16, "BF16": bf16}
ACTIVATIONS: dict[str, Activation] = {
    "int8": lambda x: per_token(x, 8),
    "int4": lambda x: per_token(x, 4),
    "mxfp4": _mx("MXFP4"),
    "mxfp8": _mx("MXFP8_E4M3"),
    "q8_0": q8_0,
    "q8_k": q8_k,
}
