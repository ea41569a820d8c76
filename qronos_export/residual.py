"""Which linear layers of a decoder block add what they return to the residual stream, and to what.

Read off one forward: the block's output is its input plus the outputs of some layers, each times a constant, and what
the stream holds before such a layer writes to it is what some module before it, mostly a norm, was given. Where norms
stand behind the layers (Gemma 3), or what is added is weighed token by token (experts), nothing is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SEEN = 1 << 20  # numbers of a stream that tell
_CLOSE = 1e-3


@dataclass(frozen=True)
class Writer:
    """A layer whose outputs, times `gain`, are added to the stream as module `reader` is given it before."""

    reader: str
    gain: float


@dataclass(frozen=True)
class Writing:
    """What a writer reads, float [..., features], and what the stream holds before it writes, [..., hidden]."""

    inputs: Tensor
    stream: Tensor


def find_writers(
    hidden: Tensor, output: Tensor, returned: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, Writer]:
    """Of a block that made `output` of `hidden` [..., hidden]; what layers `returned` and modules were `given`, by name
    in order of use, is of that size. Without those that write to what no module is given, as the second of two layers
    side by side does."""
    size = min(hidden.numel(), max(1, _SEEN // hidden.shape[-1]) * hidden.shape[-1])

    def seen(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten()[:size].double()

    if not returned:
        return {}
    stream = seen(hidden)
    added = seen(output) - stream
    parts = torch.stack([seen(each) for each in returned.values()])
    gains = torch.linalg.pinv(parts @ parts.T, hermitian=True) @ (parts @ added)
    if not bool((added - gains @ parts).norm() <= _CLOSE * added.norm()):
        return {}
    found: dict[str, Writer] = {}
    for name, gain, part in zip(returned, gains, parts, strict=True):
        if gain.abs() * part.norm() <= _CLOSE * added.norm():
            continue
        for reader, tensor in given.items():
            if (seen(tensor) - stream).norm() <= _CLOSE * min(stream.norm(), part.norm()):
                found[name] = Writer(reader, float(f"{float(gain):.4g}"))
                break
        stream = stream + gain * part
    return found
