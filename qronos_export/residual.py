"""Which linear layers of a decoder block add what they return to the residual stream, and to what.

Read off one forward: the block's output is its input plus the outputs of some layers, each times a constant, and what
the stream holds before such a layer writes to it is what some module before it, mostly a norm, was given. Where norms
stand behind the layers (Gemma 3), or where anything is weighed token by token on its way to the stream (the shared
expert of Qwen2-MoE), nothing is found in the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_WRITERS = "residual_aware: no layer was found that writes to the residual stream as it is; see docs/method.md"
_SEEN = 1 << 20  # numbers of a stream that tell
_CLOSE = 1e-3


@dataclass(frozen=True)
class Used:
    """A module that ran in a block: what it was given and, if it may write, what it returned, where these are of the
    stream's size."""

    name: str
    given: Tensor | None
    returned: Tensor | None


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


def find_writers(hidden: Tensor, output: Tensor, used: Sequence[Used]) -> dict[str, Writer]:
    """Of a block that made `output` of `hidden` [..., hidden] with what it `used`, in order.

    All tokens count alike, by what is added to them: one with massive activations decides nothing for the others.
    Without those that write to what no module before them is given, as the second of two layers side by side does.
    """
    width = hidden.shape[-1]
    tokens = min(hidden.numel() // width, max(1, _SEEN // width))

    def seen(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, width)[:tokens].double()

    start = seen(hidden)
    added = seen(output) - start
    size = added.norm(dim=1, keepdim=True)
    weight = torch.where(size > 0, 1 / size, 0.0)
    parts = [(number, each.name, seen(each.returned)) for number, each in enumerate(used) if each.returned is not None]
    if not parts:
        return {}
    columns = torch.stack([(part * weight).flatten() for *_, part in parts])
    wanted = (added * weight).flatten()
    gram = columns @ columns.T
    if not (bool(torch.isfinite(gram).all()) and bool(torch.isfinite(wanted).all())):
        return {}
    gains = torch.linalg.pinv(gram, hermitian=True) @ (columns @ wanted)
    if not bool((wanted - gains @ columns).norm() <= _CLOSE * wanted.norm()):
        return {}
    found: dict[str, Writer] = {}
    stream = start
    for (number, name, part), gain in zip(parts, gains, strict=True):
        written = gain * part
        most = float((written * weight).norm())
        if most > _CLOSE * float(wanted.norm()):
            taken = {writer.reader for writer in found.values()}
            off = {
                each.name: float(((seen(each.given) - stream) * weight).norm())
                for each in used[:number]
                if each.given is not None and each.name not in taken
            }
            reader = min(off, key=off.__getitem__, default=None)
            if reader is not None and off[reader] <= _CLOSE * most:
                found[name] = Writer(reader, float(f"{float(gain):.4g}"))
        stream = stream + written
    return found
