"""How good a file is: perplexity and KL divergence against the float model, both from llama.cpp, and the gate.

Nothing here runs a model. The reference is run once and its log-probabilities kept on disk while files are compared
with it; they can take gigabytes, and are gone when the `with` ends.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qronos_export.errors import OutputError, UsageError
from qronos_export.llamacpp import LlamaCpp, OnChunk
from qronos_export.paired import Chunks

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


@dataclass(frozen=True)
class Cache:
    """The types llama.cpp keeps keys and values in while it measures the file; the reference is always at f16."""

    k: str = "f16"
    v: str = "f16"

    def __post_init__(self) -> None:
        for option, kind in (("--cache-type-k", self.k), ("--cache-type-v", self.v)):
            if kind not in CACHE_TYPES:
                raise UsageError(f"{option} is {kind!r}; llama.cpp's cache has {', '.join(CACHE_TYPES)}.")

    @property
    def options(self) -> tuple[str, ...]:
        """For llama-perplexity; values of few bits need flash attention."""
        if self == Cache():
            return ()
        return ("--cache-type-k", self.k, "--cache-type-v", self.v, "--flash-attn", "on")


@dataclass(frozen=True)
class Validation:
    """One file against its reference, on one text. Divergences are nats per scored token, `same_top` and `rms_delta_p`
    percent, errors one standard deviation. The names are the report's keys and stay; `per_chunk` is for comparisons."""

    perplexity: float
    perplexity_error: float
    perplexity_reference: float
    perplexity_reference_error: float
    kl_divergence: float
    kl_divergence_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: float
    same_top_error: float
    rms_delta_p: float
    context: int
    chunks: int
    text_sha256: str
    llama_cpp: str | None
    cache_k: str = "f16"
    cache_v: str = "f16"
    onnxruntime: str | None = None
    per_chunk: Chunks | None = None

    @property
    def runtime(self) -> str:
        return f"llama.cpp {self.llama_cpp}" if self.onnxruntime is None else f"onnxruntime {self.onnxruntime}"

    @property
    def perplexity_increase(self) -> float:
        """Percent of the reference's perplexity: 2.5 where 10 became 10.25."""
        return 100 * (self.perplexity / self.perplexity_reference - 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """On one limit, with a sentence that has the value and the limit."""

    limit: str
    passed: bool
    says: str


@dataclass(frozen=True)
class Gate:
    """The limits a file must keep, all inclusive; None is no limit.

    max_kld, max_kl_median, max_kl_99, max_kl_max: of KL divergence: mean, median, 99th percentile, worst token; nats.
    max_ppl_increase: percent of the reference's perplexity.
    min_same_top:     percent of tokens with the reference's top token.
    max_rms_delta_p:  percent; root mean square change of the right token's probability.
    """

    max_kld: float | None = None
    max_ppl_increase: float | None = None
    max_kl_median: float | None = None
    max_kl_99: float | None = None
    max_kl_max: float | None = None
    min_same_top: float | None = None
    max_rms_delta_p: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not (0 <= limit < math.inf):
                raise UsageError(f"{_option(name)} is {limit}; expected a number that is finite and not negative.")

    def verdicts(self, validation: Validation) -> list[Verdict]:
        """On each limit there is. What is not a number keeps none."""
        found = []
        for name, limit in asdict(self).items():
            if limit is None:
                continue
            what, key, unit = _LIMITED[name]
            value = getattr(validation, key)
            least = name.startswith("min_")
            passed = value >= limit if least else value <= limit
            relation = "keeps" if passed else "is below" if least else "is above"
            found.append(Verdict(name, passed, f"{what} {value:.6g}{unit} {relation} {_option(name)} {limit:g}{unit}."))
        return found

    def check(self, validation: Validation) -> list[str]:
        """What `validation` failed: one sentence for each limit, none when it passes."""
        return [verdict.says for verdict in self.verdicts(validation) if not verdict.passed]


_LIMITED = {  # limit -> what is limited, its name in Validation, its unit
    "max_kld": ("KL divergence", "kl_divergence", ""),
    "max_ppl_increase": ("The rise of perplexity", "perplexity_increase", " %"),
    "max_kl_median": ("The median KL divergence", "kl_median", ""),
    "max_kl_99": ("The 99th percentile of KL divergence", "kl_99", ""),
    "max_kl_max": ("The largest KL divergence", "kl_max", ""),
    "min_same_top": ("The share of same top tokens", "same_top", " %"),
    "max_rms_delta_p": ("The RMS change of the right token's probability", "rms_delta_p", " %"),
}


def _option(name: str) -> str:
    """A limit as the user gave it: two are options, too."""
    return f"--{name.replace('_', '-')}" if name in ("max_kld", "max_ppl_increase") else name


class Reference:
    """A float model measured once on a text, to compare any number of files with.

        with Reference(model, text, llamacpp=find(), workspace=folder) as reference:
            for file in files:
                reference.compare(file)

    `chunks` is the most to use; a shorter text gives fewer. `cache` is for the files that are compared. `on_chunk` is
    told (chunks done, chunks in all) of the reference's own run. Entering raises CalibrationError for a text shorter
    than two chunks of `context` tokens, and OutputError when `workspace` cannot hold `logits_bytes`. `logits` is where
    they are while the `with` lasts.
    """

    def __init__(
        self,
        model: Path,
        text: Path,
        *,
        llamacpp: LlamaCpp,
        workspace: Path,
        context: int = 512,
        chunks: int | None = None,
        cache: Cache | None = None,
        on_chunk: OnChunk | None = None,
    ) -> None:
        self._cache = cache or Cache()
        self._model = model
        self._text = text
        self._llamacpp = llamacpp
        self._workspace = workspace
        self._context = context
        self._chunks = chunks
        self._on_chunk = on_chunk

    def __enter__(self) -> Self:
        if not self._workspace.is_dir():
            raise OutputError(f"The folder for the reference's log-probabilities, {self._workspace}, does not exist.")
        self._folder = Path(tempfile.mkdtemp(dir=self._workspace, prefix="reference-"))
        self.logits = self._folder / "logits"
        try:
            self.perplexity = self._llamacpp.perplexity(
                self._model,
                self._text,
                context=self._context,
                chunks=self._chunks,
                logits=self.logits,
                on_chunk=self._on_chunk,
            )
            self.text_sha256 = hashlib.sha256(self._text.read_bytes()).hexdigest()
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder)

    @contextmanager
    def log_probabilities(self, file: Path, cache: Cache, *, on_chunk: OnChunk | None = None) -> Iterator[Path]:
        """What `file` itself makes of the same chunks, in a file like the reference's own `logits`."""
        kept = self._folder / "file-logits"
        try:
            self._llamacpp.perplexity(
                file,
                self._text,
                context=self._context,
                chunks=self._chunks,
                logits=kept,
                options=cache.options,
                on_chunk=on_chunk,
            )
            yield kept
        finally:
            kept.unlink(missing_ok=True)

    def compare(self, file: Path, *, on_chunk: OnChunk | None = None) -> Validation:
        """Raises LlamaCppError when `file` has another vocabulary or gives numbers that are not finite."""
        divergence = self._llamacpp.kl_divergence(file, self.logits, options=self._cache.options, on_chunk=on_chunk)
        return Validation(
            perplexity=divergence.perplexity,
            perplexity_error=divergence.perplexity_error,
            # From its own run: the stored log-probabilities are clamped.
            perplexity_reference=self.perplexity.value,
            perplexity_reference_error=self.perplexity.error,
            kl_divergence=divergence.mean,
            kl_divergence_error=divergence.error,
            kl_median=divergence.median,
            kl_99=divergence.percentile_99,
            kl_max=divergence.maximum,
            same_top=divergence.same_top,
            same_top_error=divergence.same_top_error,
            rms_delta_p=divergence.rms_delta_p,
            context=self.perplexity.context,
            chunks=self.perplexity.chunks,
            text_sha256=self.text_sha256,
            llama_cpp=self._llamacpp.version,
            cache_k=self._cache.k,
            cache_v=self._cache.v,
            per_chunk=divergence.per_chunk,
        )


def validate(
    file: Path,
    reference: Path,
    text: Path,
    *,
    llamacpp: LlamaCpp,
    workspace: Path,
    context: int = 512,
    chunks: int | None = None,
) -> Validation:
    """One file against one reference; see Reference for several."""
    with Reference(reference, text, llamacpp=llamacpp, workspace=workspace, context=context, chunks=chunks) as measured:
        return measured.compare(file)
