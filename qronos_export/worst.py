"""The tokens on which a file differs most from its float model, with the text before them.

llama-perplexity runs once more over each file, now keeping its log-probabilities; so the numbers are those of the
runtime, and cost as much as validating on that text again.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qronos_export.checkpoint import continued, open_checkpoint, tokenizer
from qronos_export.errors import LlamaCppError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.log_probabilities import LogProbabilities, divergences
from qronos_export.proof import Held, float_file, held_out_file, reference
from qronos_export.validation import Cache

WORST = 20
BEFORE = 48  # tokens shown before the one in question


@dataclass(frozen=True)
class Guess:
    """A token as text, and its probability in the float model and in the file."""

    text: str
    in_float: float
    in_file: float


@dataclass(frozen=True)
class WorstToken:
    """One scored token: `divergence` in nats, the text of the `shown` tokens `before` it, the `right` token, and the
    likeliest one of the float model and of the file. `chunk` and `position` count from 0."""

    divergence: float
    chunk: int
    position: int
    shown: int
    before: str
    right: Guess
    of_float: Guess
    of_file: Guess


@dataclass(frozen=True)
class WorstTokens:
    """Of one file: the `tokens` that diverge most, the worst first, out of `scored`, whose `mean` divergence it is."""

    tokens: list[WorstToken]
    mean: float
    scored: int
    chunks: int
    context: int
    text_sha256: str


@torch.no_grad()
def worst_tokens(
    original: LogProbabilities,
    file: LogProbabilities,
    text_of: Callable[[Sequence[int], int], tuple[str, str]],
    *,
    count: int = WORST,
    text_sha256: str = "",
) -> WorstTokens:
    """The `count` worst of what `original` and `file` kept of the same tokens. `text_of` tokens and the next one
    is as the checkpoint's `continued`.

    Raises LlamaCppError where the two are not about the same tokens.
    """
    if original.vocabulary != file.vocabulary or not torch.equal(original.tokens, file.tokens):
        raise LlamaCppError(
            f"{file.path} and {original.path} are about different tokens: the file is not a quantization of the model."
        )
    scored, first = original.scored, original.first
    right = original.tokens[:, first + 1 :].reshape(-1)
    kept: list[tuple[float, int, list[tuple[int, float, float]]]] = []
    total, start = 0.0, 0
    for p, q in zip(original.rows(), file.rows(), strict=True):
        found = divergences(p, q)
        total += float(found.sum())
        for row in found.topk(min(count, len(found))).indices.tolist():
            ids = [int(right[start + row]), int(p[row].argmax()), int(q[row].argmax())]
            guesses = [(i, float(p[row, i].exp()), float(q[row, i].exp())) for i in ids]
            heapq.heappush(kept, (float(found[row]), -(start + row), guesses))  # of equal ones the first
            if len(kept) > count:
                heapq.heappop(kept)
        start += len(found)
    tokens = []
    for divergence, negative, guesses in sorted(kept, reverse=True):
        chunk, place = divmod(-negative, scored)
        position = first + 1 + place
        ids = original.tokens[chunk, max(0, position - BEFORE) : position].tolist()
        texts = [text_of(ids, token) for token, _, _ in guesses]
        before = min((text for text, _ in texts), key=len)  # of a character that a guess completes the guess has all
        chosen = [Guess(piece, *rest) for (_, piece), (_, *rest) in zip(texts, guesses, strict=True)]
        tokens.append(WorstToken(divergence, chunk, position, len(ids), before, *chosen))
    return WorstTokens(tokens, total / start, start, original.chunks, original.context, text_sha256)


def measure(
    model: str,
    files: Sequence[tuple[Path, Cache]],
    held: Held,
    *,
    llamacpp: LlamaCpp,
    on_file: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[WorstTokens]:
    """The worst tokens of each of `files`, whose keys and values llama.cpp keeps in its Cache, against their float
    `model`: folder, hub id, .gguf or `demo`. `on_file` is told which model runs."""
    checkpoint = open_checkpoint(model)
    text_of = partial(continued, tokenizer(checkpoint))
    results = []
    with tempfile.TemporaryDirectory(prefix="qronos-export-") as scratch:
        folder = Path(scratch)
        text = held_out_file(held, folder)
        if on_file:
            on_file(checkpoint.name)
        with reference(
            float_file(checkpoint, llamacpp, folder), text, held, llamacpp, folder, Cache(), on_progress
        ) as against:
            original = LogProbabilities(against.logits)
            for path, cache in files:
                if on_file:
                    on_file(path.name)
                with against.log_probabilities(path, cache, on_chunk=on_progress) as kept:
                    results.append(
                        worst_tokens(original, LogProbabilities(kept), text_of, text_sha256=against.text_sha256)
                    )
    return results
