"""Calibration text as token ids: from a file, from a `datasets` dataset, or sampled from the model itself.

Every source yields `samples` windows of `length` tokens, the same for the same seed. Nothing is padded or repeated: a
source that is too short is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qronos_export.checkpoint import Checkpoint, load_whole, opening_token, tokenizer
from qronos_export.errors import CalibrationError

if TYPE_CHECKING:
    from datasets import Dataset

PIECE = 1 << 16
"""Characters tokenized at a time; pieces end at line ends, where at most the newline's own token differs."""
BYTES_PER_TOKEN = 64
"""Of a text this many times longer than needed (about 4 bytes make a token), pieces are skipped evenly."""
BATCH = 64
"""At most so many windows are sampled side by side; per core, 128 were 1.7 times as fast as 32."""
CACHE_BYTES = 4 << 30
"""Float32 keys and values of a batch stay below this, counted as if every head had its own."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    tokens: Tensor
    """int64 [samples, length], on the CPU."""
    description: str
    """Where they came from, for the report."""
    sha256: str
    """Of the ids as little-endian int64."""


def calibration_tokens(
    source: str,
    checkpoint: Checkpoint,
    *,
    samples: int,
    length: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Corpus:
    """`samples` windows of `length` tokens from `source`: a file, `hf:NAME[:CONFIG[:SPLIT]]`, or `self`.

    `on_progress(done, total)` counts sampled tokens; only `self` takes long enough to call it. Raises CalibrationError
    where the source is absent, unreadable or short.
    """
    if source == "self":
        tokens, description = _from_model(checkpoint, samples, length, seed, device, on_progress), "sampled from itself"
    else:
        text, description = _from_dataset(source, checkpoint) if source.startswith("hf:") else _from_file(source)
        tokens = _windows(text, description, checkpoint, samples, length, seed)
    return Corpus(tokens, description, hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest())


def check_length(text: Path, checkpoint: Checkpoint, needed: int) -> None:
    """Raises CalibrationError unless `text` has at least `needed` tokens; reads no more of it than that takes."""
    with text.open(encoding="utf-8", errors="replace") as file:
        head = file.read(BYTES_PER_TOKEN * needed)
    found = len(tokenizer(checkpoint)(head, verbose=False)["input_ids"])
    if found < needed:
        raise CalibrationError(
            f"{text} is too short: {found} tokens, and two chunks need {needed}. "
            "Use a longer text or a smaller --context."
        )


def held_out_tokens(text: Path, checkpoint: Checkpoint, context: int, chunks: int | None) -> Tensor:
    """`text` as llama-perplexity cuts it: int64 [chunks, context], the opening token, if any, in front of every chunk.

    Raises CalibrationError for less than two chunks, as llama-perplexity does.
    """
    encode = tokenizer(checkpoint)
    opening = opening_token(encode)
    ids = [] if opening is None else [opening]
    for piece in _pieces(text.read_text(encoding="utf-8", errors="replace")):
        ids += encode(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if chunks is not None and len(ids) >= chunks * context:
            break
    found = len(ids) // context
    if found < 2:
        raise CalibrationError(f"{text} is too short: {len(ids)} tokens, and two chunks need {2 * context}.")
    rows = torch.tensor(ids[: found * context]).view(-1, context)[:chunks]
    if opening is not None:
        rows[:, 0] = opening
    return rows


def held_out_text() -> str:
    """0.5 to 0.7 MB of English that every Python carries: the topics of its own `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def median_length(source: str, checkpoint: Checkpoint) -> int:
    """Tokens of the median prompt in the file `source`, the lower of two, the opening token counted.

    A prompt is a line of text, or in a .jsonl file a record: all of its strings, joined by newlines. Calibrating on
    sequences as long as a task's shows its activations (SLAC, arXiv 2311.05161). Raises CalibrationError for a file
    that cannot be read, or that holds no prompts of two tokens and more.
    """
    prompts = _from_file(source, "give a text file or a .jsonl file of prompts")[0].split("\n")
    if Path(source).suffix == ".jsonl":
        prompts = [_joined(line, f"{source}, line {n}") for n, line in enumerate(prompts, start=1) if line.strip()]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    found = median_low(map(len, tokenizer(checkpoint)(prompts, verbose=False)["input_ids"])) if prompts else 0
    if found < 2:
        what = f"prompts with a median of {found} tokens" if prompts else "no prompt"
        raise CalibrationError(f"{source} holds {what}; put one in each line, of at least two tokens.")
    return found


def _joined(line: str, where: str) -> str:
    try:
        return "\n".join(_strings(json.loads(line)))
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON ({error}); put one record in each line.") from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in plain data, not the keys, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _from_file(source: str, advice: str = "give a text file, hf:NAME[:CONFIG[:SPLIT]], or self") -> tuple[str, str]:
    path = Path(source).expanduser()
    try:
        return path.read_bytes().decode("utf-8"), path.name
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{source} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"give a plain text file."
        ) from error
    except OSError as error:
        raise CalibrationError(f"{source} cannot be read ({error.strerror}); {advice}.") from error


def _windows(text: str, description: str, checkpoint: Checkpoint, samples: int, length: int, seed: int) -> Tensor:
    """Disjoint windows at seeded places, in the order of the text."""
    encode = tokenizer(checkpoint)
    opening = opening_token(encode)
    pieces = list(_pieces(text))
    pieces = pieces[:: max(1, len(text) // (BYTES_PER_TOKEN * samples * length))]
    ids = [i for piece in encode(pieces, add_special_tokens=False, verbose=False)["input_ids"] for i in piece]
    if len(ids) < samples * length:
        fits = len(ids) // length
        advice = f"or --samples {fits}" if fits else f"or a shorter --sequence-length, at most {len(ids)}"
        raise CalibrationError(
            f"{description} has {len(ids)} tokens; {samples} samples of {length} need {samples * length}. "
            f"Give a longer text, {advice}."
        )
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    tokens = rows[chosen.sort().values]
    if opening is not None:
        tokens[:, 0] = opening  # as llama.cpp does for each chunk
    return tokens


def _pieces(text: str) -> Iterator[str]:
    start = 0
    for line_end in re.finditer(r"\n(?!\n)", text):
        if line_end.end() - start >= PIECE:
            yield text[start : line_end.end()]
            start = line_end.end()
    if start < len(text):
        yield text[start:]


def _from_dataset(source: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """NAME is a hub dataset or a local folder of jsonl, parquet, csv or text files."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{source} needs the datasets package; run `pip install 'qronos-export[datasets]'`."
        ) from error
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or len(rest) > 2:
        raise CalibrationError(f"{source} is not hf:NAME[:CONFIG[:SPLIT]].")
    try:
        dataset = load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{source} cannot be loaded: {error}") from error
    return "\n\n".join(_texts(dataset, source, checkpoint)), source


def _texts(dataset: "Dataset", source: str, checkpoint: Checkpoint) -> Iterator[str]:
    columns = dataset.column_names
    for column in ("text", "content"):
        if column in columns:
            yield from dataset[column]
            return
    if "messages" not in columns:
        raise CalibrationError(f"{source} has the columns {', '.join(columns)}; needed: text, content or messages.")
    encode = tokenizer(checkpoint)
    for messages in dataset["messages"]:
        if encode.chat_template:
            yield str(encode.apply_chat_template(messages, tokenize=False))
        else:
            yield "\n\n".join(message["content"] for message in messages)


def _from_model(
    checkpoint: Checkpoint,
    samples: int,
    length: int,
    seed: int,
    device: torch.device | str,
    on_progress: Progress | None,
) -> Tensor:
    """Text by the model at temperature 1, in the spirit of LLM-QAT (arXiv 2305.17888).

    A window starts with BOS, or where the tokenizer adds none with an ordinary token drawn uniformly (their way to
    variety). The model's end of text does not end a window: what it writes next is part of its distribution, too.
    """
    encode = tokenizer(checkpoint)
    opening = opening_token(encode)
    ordinary = torch.tensor(sorted(set(encode.get_vocab().values()) - set(encode.all_special_ids)))
    model: Any = load_whole(checkpoint, device)
    model.generation_config = type(model.generation_config)(  # a fresh one: the checkpoint's own narrows the choice
        do_sample=False,  # the greatest of what `_drawn` leaves
        max_new_tokens=length - 1,
        pad_token_id=0,
    )
    counter = _TokenCounter(samples * length, on_progress)
    at_once = at_a_time(model.config.get_text_config(), length)
    batches = []
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        with torch.random.fork_rng(devices=[device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed + start)
            first = (
                ordinary[torch.randint(len(ordinary), (size, 1))] if opening is None else torch.full((size, 1), opening)
            )
            batch = model.generate(
                first.to(device), attention_mask=torch.ones_like(first, device=device), streamer=counter,
                logits_processor=[_drawn],
            )  # fmt: skip
        batches.append(batch.cpu())
    return torch.cat(batches)


def _drawn(ids: Tensor, logits: Tensor) -> Tensor:
    """Zero at a token drawn from what `logits` [sequences, vocabulary] say, −∞ elsewhere.

    On a CPU by one number for a sequence and the sums of probabilities, for a third of what torch.multinomial's one for
    each token takes. On a GPU such sums need not be the same twice.
    """
    chances = logits.float().softmax(-1)
    if chances.device.type == "cpu":
        sums = chances.cumsum(-1)
        token = torch.searchsorted(sums, torch.rand(len(sums), 1) * sums[:, -1:], right=True)
        token = token.clamp_(max=sums.shape[1] - 1)
    else:
        token = torch.multinomial(chances, 1)
    return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


def at_a_time(shape: Any, length: int) -> int:
    """Sequences of `length` that a model of `shape`, its text configuration, samples at a time."""
    return min(BATCH, max(1, CACHE_BYTES // (length * shape.num_hidden_layers * shape.hidden_size * 8)))


class _TokenCounter:
    """What `generate` calls a streamer; counts the tokens of a whole batch as they are drawn."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def put(self, ids: Tensor) -> None:
        self.done += ids.numel()
        if self.on_progress:
            self.on_progress(self.done, self.total)

    def end(self) -> None:
        pass
