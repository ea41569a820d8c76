"""What llama.cpp's tools print, as numbers. Text in, dataclasses out; runs nothing.

Formats are those of b11549. The measuring tools are run with `--log-jsonl`: one object a line, whose `msg` need not be
a whole line, so messages are joined before anything is searched in them.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

from qronos_export.errors import CalibrationError, LlamaCppError, OutputError, PlanError
from qronos_export.paired import Chunks


@dataclass(frozen=True)
class Perplexity:
    """`error` is one standard deviation of the mean; the first half of each chunk is context and not scored."""

    value: float
    error: float
    chunks: int
    context: int


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a model from its reference: nats per scored token. Errors are one standard
    deviation of the mean; `same_top` and `rms_delta_p` are percent, as llama.cpp gives them.

    `perplexity_reference` comes from the reference's stored log-probabilities, clamped at 16 nats below the best: take
    the reference's own `Perplexity` where the number matters.
    """

    perplexity: float
    perplexity_error: float
    perplexity_reference: float
    ln_ratio: float  # mean ln(perplexity / perplexity_reference)
    ln_ratio_error: float
    mean: float
    error: float
    median: float
    percentile_90: float
    percentile_99: float
    maximum: float
    same_top: float
    same_top_error: float
    rms_delta_p: float
    rms_delta_p_error: float
    chunks: int
    context: int
    per_chunk: Chunks


class LostLines(LlamaCppError):
    """A run that ended well without printing its result.

    llama.cpp logs from a thread that the program does not wait for when it ends (its issue 22142); on a busy machine
    the last lines can be missing.
    """


class Progress:
    """Reads a measuring tool's `--log-jsonl` while it runs: collects its text and errors, counts chunks.

    `on_start` is told (chunks, context) before the first chunk is computed, and may raise to stop the tool.
    """

    def __init__(
        self,
        model: Path,
        text_file: Path | None,
        on_chunk: Callable[[int, int], None] | None = None,
        on_start: Callable[[int, int], None] | None = None,
    ) -> None:
        self.text = ""
        self._model = model
        self._text_file = text_file
        self._on_chunk = on_chunk
        self._on_start = on_start
        self._errors: list[str] = []
        self._chunks = 0

    def feed(self, line: str) -> None:
        entry = _entry(line)
        if entry is None:
            self.text += line + "\n"  # printed before logging starts, or by a library
            return
        if entry.get("type") != "log":
            return
        message = str(entry["msg"])
        self.text += message
        if entry["level"] == "error":
            self._errors.append(message.strip())
            self._raise_if_hopeless()
        if started := _START.search(message):
            self._chunks = int(started[1])
            if self._on_start:
                self._on_start(self._chunks, int(started[2]))
        elif self._on_chunk and (chunk := re.match(r"\[(\d+)\]|\s*(\d+)$", message)):
            self._on_chunk(int(chunk[1] or chunk[2]), self._chunks)

    def raise_errors(self) -> None:
        """llama-perplexity can report an error, a failed batch say, and still exit with 0."""
        if self._errors:
            raise LlamaCppError(
                f"llama.cpp could not measure {self._model}:\n" + "\n".join(f"    {e}" for e in self._errors)
            )

    def _raise_if_hopeless(self) -> None:
        """Errors after which the tool exits with 0, or computes on with what is not there."""
        errors = "\n".join(self._errors)
        needed = re.search(r"need at least (\d+) tokens", errors)
        present = re.search(r"tokenizes to only (\d+) tokens", errors)
        if needed and present:
            raise CalibrationError(
                f"{self._text_file} is too short: {present[1]} tokens, and two chunks need {needed[1]}. "
                "Use a longer text or a smaller --context."
            )
        if differ := re.search(r"inconsistent vocabulary \((\d+) vs (\d+)\)", errors):
            raise LlamaCppError(
                f"{self._model} has {differ[2]} tokens in its vocabulary and the reference has {differ[1]}: "
                "it is not a quantization of that model. Compare it with the model it was made from."
            )


_START = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks, n_ctx=(\d+)")
_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf))"


def perplexity(text: str, model: Path) -> Perplexity:
    chunks, context = _start(text, model)
    value, error = _values(text, rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}", model)
    return Perplexity(value, error, chunks, context)


LEAST = 100  # tokens; llama-perplexity prints no statistics of fewer


def check_scored(chunks: int, context: int) -> None:
    """Raises CalibrationError where llama-perplexity scores too few tokens to compare a file with its reference."""
    scored = chunks * (context - 1 - context // 2)
    if scored < LEAST:
        raise CalibrationError(
            f"{chunks} chunks of {context} tokens are {scored} that are scored, and llama.cpp compares files on "
            f"{LEAST} or more. Use more --chunks, or a larger --context."
        )


def divergence(text: str, model: Path) -> Divergence:
    chunks, context = _start(text, model)
    check_scored(chunks, context)
    table = re.sub(" +", " ", text)

    def single(label: str) -> float:
        (value,) = _values(table, rf"^ ?{re.escape(label)} ?: {_NUMBER}", model)
        return value

    def pair(label: str) -> tuple[float, float]:
        # Of files that hardly differ, a variance by subtraction may round to less than zero: ± -nan.
        value, error = _values(
            table.replace(" ± -nan", " ± 0"), rf"^ ?{re.escape(label)} ?: {_NUMBER} ± {_NUMBER}", model
        )
        return value, error

    perplexity, perplexity_error = pair("Mean PPL(Q)")
    ln_ratio, ln_ratio_error = pair("Mean ln(PPL(Q)/PPL(base))")
    mean, error = pair("Mean KLD")
    same_top, same_top_error = pair("Same top p")
    rms_delta_p, rms_delta_p_error = pair("RMS Δp")
    return Divergence(
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        perplexity_reference=single("Mean PPL(base)"),
        ln_ratio=ln_ratio,
        ln_ratio_error=ln_ratio_error,
        mean=mean,
        error=error,
        median=single("Median KLD"),
        percentile_90=single("90.0% KLD"),
        percentile_99=single("99.0% KLD"),
        maximum=single("Maximum KLD"),
        same_top=same_top,
        same_top_error=same_top_error,
        rms_delta_p=rms_delta_p,
        rms_delta_p_error=rms_delta_p_error,
        chunks=chunks,
        context=context,
        per_chunk=_per_chunk(text, chunks, model),
    )


def _per_chunk(text: str, chunks: int, model: Path) -> Chunks:
    """From the table's rows: chunk, perplexity, ln of its ratio, divergence, RMS Δp, same top; each ± its error.

    The values are means over chunks 1 … k, with 4, 5, 5, 3 and 3 decimals. So a chunk late in a long run is known less
    well, its divergence to about k · 4e-6 nats; what rounding gives one chunk it takes from the next.
    """
    row = rf"^ *(\d+) +{_NUMBER} ± +\S+ +\S+ ± +\S+ +{_NUMBER} ± +\S+ +\S+ ± +\S+ % +{_NUMBER} ± +\S+ %$"
    rows = re.findall(row, text, re.M)
    if [int(number) for number, *_ in rows] != list(range(1, chunks + 1)):
        raise LostLines(f"llama.cpp printed {len(rows)} rows for {chunks} chunks of {model}; {_OTHER}")
    running = [[float(value) for value in values] for _, *values in rows]
    return Chunks(
        loss=_differences([math.log(perplexity) for perplexity, _, _ in running]),
        kl_divergence=_differences([divergence for _, divergence, _ in running]),
        same_top=_differences([same for _, _, same in running]),
    )


def _differences(running: list[float]) -> list[float]:
    """Values whose means over the first 1, 2, … are `running`."""
    sums = [0.0, *(count * mean for count, mean in enumerate(running, start=1))]
    return [after - before for before, after in pairwise(sums)]


def rates(text: str, file: Path) -> tuple[list[float], list[float]]:
    """Tokens per second of every repetition, from `llama-bench -o jsonl`: of prompts, and of tokens one by one."""
    tests = [entry for line in text.splitlines() if (entry := _entry(line)) and "samples_ts" in entry]
    found = {bool(test["n_gen"]): [float(rate) for rate in cast(list[float], test["samples_ts"])] for test in tests}
    if set(found) != {False, True}:
        raise LostLines(f"llama-bench printed no rates of {file}; {_OTHER}")
    return found[False], found[True]


def logits_bytes(vocabulary: int, context: int, chunks: int) -> int:
    """Size of the file `--kl-divergence-base` writes, to the byte.

    8 bytes "_logits_" | u32 context, vocabulary, chunks | i32 token[chunks·context]
    then for each scored token, of which a chunk has context − 1 − ⌊context/2⌋:
    f32 scale, f32 minimum | u16 log-probability[vocabulary, rounded up to even]
    """
    scored = chunks * (context - 1 - context // 2)
    return 8 + 3 * 4 + 4 * chunks * context + scored * (2 * 4 + 2 * (vocabulary + vocabulary % 2))


def logits_context(logits: Path) -> int:
    """Tokens a chunk in a `--kl-divergence-base` file."""
    with logits.open("rb") as file:
        head = file.read(12)
    if len(head) < 12 or not head.startswith(b"_logits_"):
        raise OutputError(f"{logits} is not a file of log-probabilities that llama-perplexity wrote.")
    return int(struct.unpack("<I", head[8:])[0])


@dataclass(frozen=True)
class PlannedTypes:
    """What `llama-quantize --dry-run` says it would write.

    types:        tensor name -> type ("Q4_0", "F32").
    substitutes:  tensor name -> the type that was meant, where its blocks do not divide the tensor's rows.
    """

    types: dict[str, str]
    substitutes: dict[str, str]


def planned_types(text: str) -> PlannedTypes:
    """From `llama-quantize --dry-run`; a tensor without an arrow keeps the type it has."""
    tensor = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = *(\w+), size =[^>\n]*(?:> .*\((\w+)\))?", re.M)
    types = {name: (new or old).upper() for name, old, new in tensor.findall(text)}
    meant = re.compile(r"^warning: (\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\)", re.M)
    return PlannedTypes(types, {name: wanted.upper() for name, wanted in meant.findall(text)})


def unplannable(text: str) -> PlanError | None:
    """The refusal of `llama-quantize` that is about a tensor and a type, not about the tool."""
    refused = re.search(
        r"(\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\).*no tensor type", text
    )
    if refused is None:
        return None
    tensor, columns, block, kind = refused.groups()
    return PlanError(
        f"{tensor} cannot be {kind.upper()}: its rows of {columns} weights do not divide into blocks of {block}, and "
        "llama.cpp has no substitute for this type. Choose another --format, or an --override for such tensors."
    )


def quantize_types(text: str) -> dict[str, int | None]:
    """Names and numbers from `llama-quantize --help`, whose list reads "  15  or  Q4_K_M  :  4.58G…"; COPY has none."""
    found = re.findall(r"^ *(?:(\d+) +or)? +([A-Z]\w*) +: ", text, re.M)
    return {name: int(number) if number else None for number, name in found}


def vocabulary(text: str, model: Path) -> int:
    """From the header a tool prints while loading."""
    tokens = re.search(r"tokenizer\.ggml\.tokens +arr\[str,(\d+)\]", text)
    if tokens is None:
        raise LlamaCppError(f"{model} has no vocabulary (tokenizer.ggml.tokens), so no text can be measured with it.")
    return int(tokens[1])


def parts(text: str, model: Path) -> list[int]:
    """Tensors in each of the files that llama-gguf-split makes of one, from "n_split: 3" and a line for each,
    "split 00001: n_tensors = 4, total_size = 1M"."""
    count = re.search(r"^n_split: (\d+)$", text, re.MULTILINE)
    found = re.findall(r"^split \d+: n_tensors = (\d+),", text, re.MULTILINE)
    if count is None or len(found) != int(count[1]):
        raise LlamaCppError(f"llama-gguf-split did not say into which parts {model} goes.")
    return [int(each) for each in found]


def version(text: str) -> str:
    """From `--version`: "version: 0.6.0-dev (build 11549, commit xllamacpp)", formerly "version: 6000 (1a2b3c4)"."""
    for pattern in (r"version: .*\(build (\d+), commit (\S+)\)", r"version: (\d+) \((\S+)\)"):
        if found := re.search(pattern, text):
            return f"b{found[1]} ({found[2]})"
    raise LlamaCppError(f"This does not look like llama.cpp: --version printed\n    {text.strip()}")


def plain(line: str) -> str:
    """A line of `--log-jsonl` as a person reads it."""
    entry = _entry(line)
    return str(entry["msg"]).rstrip() if entry and entry.get("type") == "log" else line


def _entry(line: str) -> dict[str, object] | None:
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) else None


def _start(text: str, model: Path) -> tuple[int, int]:
    if (started := _START.search(text)) is None:
        raise LostLines(f"llama.cpp did not say how many chunks of {model} it measured; {_OTHER}")
    return int(started[1]), int(started[2])


def _values(text: str, pattern: str, model: Path) -> list[float]:
    found = re.search(pattern, text, re.M)
    if found is None:
        raise LostLines(f"llama.cpp printed no line like {pattern!r} for {model}; {_OTHER}")
    values = [float(value) for value in found.groups()]
    if not all(map(math.isfinite, values)):
        raise LlamaCppError(f"{model} gives numbers that are not finite: {found[0].strip()!r}. Its weights are broken.")
    return values


_OTHER = "its output format is another one. `qronos-export llamacpp install` builds a version that is known to work."
