"""Log-probabilities that llama-perplexity kept (`--kl-divergence-base`), read a few rows at a time.

The layout is in the docstring of `llamacpp_log.logits_bytes`. A log-probability is minimum + scale · code; what lies
more than 16 nats below the likeliest token is stored as if it were there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qronos_export.errors import LlamaCppError
from qronos_export.llamacpp_log import logits_bytes

_HEADER = struct.Struct("<8sIII")
_AT_ONCE = 1 << 22  # log-probabilities read at a time
FLOOR = -16.0
"""Where llama.cpp's own divergence leaves a token of the reference out."""


class LogProbabilities:
    """A file of them: `tokens` int64 [chunks, context]; `first` is the position in a chunk whose prediction is the
    first that is scored, `scored` how many a chunk has.

    Raises LlamaCppError for a file that llama-perplexity did not write, or not to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            magic, self.context, self.vocabulary, self.chunks = (
                _HEADER.unpack(head) if len(head) == _HEADER.size else (b"", 0, 0, 0)
            )
            whole = logits_bytes(self.vocabulary, self.context, self.chunks)
            if magic != b"_logits_" or path.stat().st_size != whole:
                raise LlamaCppError(f"{path} is not a whole file of log-probabilities that llama-perplexity wrote.")
            ids = bytearray(file.read(4 * self.chunks * self.context))
        self.tokens = torch.frombuffer(ids, dtype=torch.int32).view(self.chunks, self.context).long()
        self.first = self.context // 2
        self.scored = self.context - 1 - self.first

    def rows(self) -> Iterator[Tensor]:
        """All scored predictions in order, some at a time: float32 [rows, vocabulary]."""
        width = self.vocabulary + self.vocabulary % 2
        row_bytes = 2 * 4 + 2 * width
        left = self.chunks * self.scored
        with self.path.open("rb") as file:
            file.seek(_HEADER.size + 4 * self.chunks * self.context)
            while left:
                count = min(left, max(1, _AT_ONCE // width))
                raw = torch.frombuffer(bytearray(file.read(count * row_bytes)), dtype=torch.uint8)
                raw = raw.view(count, row_bytes)
                scale, minimum = raw[:, :8].contiguous().view(torch.float32).split(1, dim=1)
                codes = raw[:, 8:].contiguous().view(torch.uint16)[:, : self.vocabulary]
                yield minimum + scale * codes.float()
                left -= count


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of `q` from `p`, log-probabilities [rows, vocabulary], as llama-perplexity sums it: float64 [rows],
    nats."""
    p, q = p.double(), q.double()
    return torch.where(p > FLOOR, p.exp() * (p - q), 0.0).sum(1)
