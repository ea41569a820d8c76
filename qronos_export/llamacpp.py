"""Runs llama.cpp's tools, and turns what they print into numbers.

The tools are real programs on this machine; this module never downloads or builds (llamacpp_build.py does) and never
guesses a number that a tool did not print. A file a tool writes appears whole or not at all.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qronos_export import llamacpp_log as log
from qronos_export.errors import CalibrationError, CheckpointError, LlamaCppError, OutputError, UsageError
from qronos_export.process import SilentError, run, until_told

PINNED = "b11549"
VARIABLE = "QRONOS_EXPORT_LLAMACPP"
TOOLS = ("llama-perplexity", "llama-quantize", "llama-imatrix", "llama-completion")
BENCH = "llama-bench"  # needed for `compare --speed` alone
SPLITTER = "llama-gguf-split"  # needed for files too large to publish in one piece alone
INSTALLED = "`qronos-export llamacpp install`"  # the origin of our own
CONVERTER = "convert_hf_to_gguf.py"
CARD = "README.md"
TENSOR_LIST = 1 << 25  # bytes; no list of tensors in a file's header comes near
_LIMITED = (  # becomes Python with the other arguments, and a limit on files it writes
    "import os, resource, sys; size = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)

OnChunk = Callable[[int, int], None]  # (chunks done, chunks in all)


@dataclass(frozen=True)
class LlamaCpp:
    """One set of tools: where they are, what they are, and why these.

    `source` is the folder of the converter with its own `conversion/` and `gguf-py/`, which belong together.
    `threads` None leaves the choice to llama.cpp; `time_limit` is in seconds, for each run of a tool.
    """

    bin_folder: Path
    source: Path | None
    version: str  # "b11549 (xllamacpp)"
    origin: str
    threads: int | None = None
    time_limit: float = 24 * 3600.0

    def convert(self, checkpoint: Path, destination: Path, outtype: str) -> Path:
        """A Hugging Face folder as one float GGUF file; `outtype`: f32, f16, bf16 or auto.

        Runs upstream's converter in this Python, offline. It takes metadata out of a README.md and stumbles over some
        (a language `no`, which YAML takes for false); then it gets the folder without that file. Raises CheckpointError
        when llama.cpp does not know the architecture or the tokenizer.
        """
        with _whole(destination) as partial:
            self._convert(checkpoint, partial, outtype)
        return destination

    def convert_header(self, checkpoint: Path, destination: Path, outtype: str) -> Path:
        """The beginning of the file that `convert` would write: all of its metadata, names, shapes and types, and some
        of the weights. Raises as `convert`.

        The converter is stopped by a limit on the size of its file, which what the metadata are made of does not reach.
        """
        made_of = sum(file.stat().st_size for file in checkpoint.iterdir() if file.suffix != ".safetensors")
        limit = 2 * made_of + TENSOR_LIST
        with _whole(destination) as partial:
            try:
                self._convert(checkpoint, partial, outtype, limit)
            except LlamaCppError:
                if not (partial.is_file() and partial.stat().st_size >= limit):
                    raise
        return destination

    def _convert(self, checkpoint: Path, partial: Path, outtype: str, limit: int | None = None) -> None:
        if self.source is None:
            raise LlamaCppError(
                f"{self.bin_folder} has llama.cpp's tools but no source with {CONVERTER} beside it; none is cached. "
                f"Run `qronos-export llamacpp install`, or point {VARIABLE} at a llama.cpp checkout with build/bin."
            )
        if not (checkpoint / "config.json").is_file():
            raise CheckpointError(f"{checkpoint} has no config.json; expected the folder of a Hugging Face checkpoint.")
        printed: list[str] = []
        # PyPI's gguf carries upstream's version number but not upstream's code, and the converter crashes with it.
        modules = os.pathsep.join(filter(None, [str(self.source / "gguf-py"), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": modules, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"}
        arguments: list[str | Path] = [checkpoint.absolute(), "--outfile", partial, "--outtype", outtype]
        command: list[str | Path] = [sys.executable, self.source / CONVERTER, *arguments]
        if limit is not None:
            command[1:1] = ["-c", _LIMITED, str(limit)]
        try:
            run(command, time_limit=self.time_limit, on_line=printed.append, environment=environment)
        except LlamaCppError:
            if refused := _refused(checkpoint, printed, self.version):
                raise refused from None
            full = limit is not None and partial.is_file() and partial.stat().st_size >= limit
            if full or not (checkpoint / CARD).is_file():
                raise
            with _without_card(checkpoint) as bare:
                self._convert(bare, partial, outtype, limit)

    def quantize(
        self,
        source: Path,
        destination: Path,
        ftype: str,
        *,
        imatrix: Path | None = None,
        tensor_types: Mapping[str, str] | None = None,
        pure: bool = False,
        options: Sequence[str] = (),
    ) -> Path:
        """`llama-quantize`: the file to be beaten. `ftype` as it lists them ("Q4_0", "Q4_K_M"); `tensor_types` maps
        patterns of tensor names to types; `options` are passed on as they are ("--allow-requantize")."""
        how = self._quantize_options(ftype, imatrix, tensor_types, pure, options)
        threads = [str(self.threads)] if self.threads else []
        with _whole(destination) as partial:
            self._run("llama-quantize", [*how, _model(source), partial, ftype, *threads])
        return destination

    def plan(
        self,
        source: Path,
        ftype: str,
        *,
        imatrix: Path | None = None,
        tensor_types: Mapping[str, str] | None = None,
        pure: bool = False,
        options: Sequence[str] = (),
    ) -> log.PlannedTypes:
        """The types that `quantize` with the same arguments would write, without writing.

        Raises PlanError where a type's blocks do not divide some rows and llama.cpp has no substitute for it.
        """
        how = self._quantize_options(ftype, imatrix, tensor_types, pure, options)
        try:
            planned = log.planned_types(self._run("llama-quantize", [*how, "--dry-run", _model(source), ftype]))
        except LlamaCppError as error:
            raise log.unplannable(str(error)) or error from None
        if not planned.types:
            raise LlamaCppError(f"llama-quantize --dry-run listed no tensors of {source}. {self._hint()}")
        return planned

    def parts(self, file: Path, megabytes: int) -> list[int]:
        """Tensors in each of the files that `split` would write, without writing."""
        return log.parts(self._split(file, megabytes, file, "--dry-run"), file)

    def split(self, file: Path, megabytes: int, folder: Path) -> list[Path]:
        """`llama-gguf-split`: `file` as <stem>-00001-of-0000N.gguf, … in `folder`, none with more than `megabytes` MB
        of tensors; llama.cpp opens all by the first. Raises LlamaCppError where a tensor is larger than that."""
        parts = log.parts(self._split(file, megabytes, folder / file.stem), file)
        return [folder / part for part in part_names(file.name, len(parts))]

    def _split(self, file: Path, megabytes: int, stem: Path, *options: str) -> str:
        if not (self.bin_folder / SPLITTER).is_file():
            raise LlamaCppError(
                f"{file.name} has to be published in parts, and {self.bin_folder} has no {SPLITTER}. "
                f"Run `qronos-export llamacpp install`, build that target there too, or raise --split-size."
            )
        limit = ["--split-max-size", f"{megabytes}M"]
        return self._run(SPLITTER, ["--split", *limit, *options, _model(file), stem.absolute()])

    def quantize_types(self) -> dict[str, int | None]:
        """The names `llama-quantize` accepts, and the numbers that `general.file_type` says them by."""
        command: list[str | Path] = [self.bin_folder / "llama-quantize", "--help"]
        return log.quantize_types(run(command, time_limit=self.time_limit, exit_codes=(0, 1), hint=self._hint()))

    def vocabulary(self, model: Path) -> int:
        """Tokens in the file's vocabulary."""
        # A dry run reads the header only, and prints it.
        return log.vocabulary(self._run("llama-quantize", ["--dry-run", _model(model), "COPY"]), model)

    def imatrix(
        self,
        model: Path,
        text: Path,
        destination: Path,
        *,
        context: int = 512,
        chunks: int | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Path:
        """`llama-imatrix`: mean squared activations of `model` on `text`, in the GGUF form `quantize` reads."""
        with _whole(destination) as partial:
            self._evaluate(
                "llama-imatrix", model, text, context, chunks, ["-o", partial], log.Progress(model, text, on_chunk)
            )
        return destination

    @until_told(log.LostLines)
    def perplexity(
        self,
        model: Path,
        text: Path,
        *,
        context: int = 512,
        chunks: int | None = None,
        logits: Path | None = None,
        options: Sequence[str] = (),
        on_chunk: OnChunk | None = None,
    ) -> log.Perplexity:
        """Perplexity of `model` over the second half of each chunk of `context` tokens; `logits` also keeps every
        scored log-probability for `kl_divergence`, in a file of `log.logits_bytes`.

        `options` go to llama-perplexity as they are, say ("--cache-type-k", "q8_0").

        Raises CalibrationError when the text is shorter than two chunks or too little is scored for `logits` to be of
        use, OutputError when the disk cannot hold
        `logits` (before anything is computed), LlamaCppError when the result is not a finite number.
        """
        if logits is None:
            progress = log.Progress(model, text, on_chunk)
            self._evaluate("llama-perplexity", model, text, context, chunks, options, progress)
            return log.perplexity(progress.text, model)

        vocabulary = self.vocabulary(model)
        size = 0

        def check(chunks: int, context: int) -> None:
            nonlocal size
            log.check_scored(chunks, context)
            size = log.logits_bytes(vocabulary, context, chunks)
            free = shutil.disk_usage(logits.parent).free
            if size > free:
                raise OutputError(
                    f"The reference's log-probabilities need {size / 1e9:.3g} GB in {logits.parent}, which has "
                    f"{free / 1e9:.3g} GB free. Use fewer than {chunks} --chunks, or set TMPDIR to a larger disk."
                )

        progress = log.Progress(model, text, on_chunk, on_start=check)
        with _whole(logits) as partial:
            more: list[str | Path] = [*options, "--kl-divergence-base", partial]
            self._evaluate("llama-perplexity", model, text, context, chunks, more, progress)
            if not size:
                raise log.LostLines(
                    f"llama-perplexity computed nothing of {text} and did not say why; two chunks need "
                    f"{2 * context} tokens. Use a longer text or a smaller --context."
                )
            if (written := partial.stat().st_size) != size:  # llama-perplexity does not notice a full disk
                raise OutputError(
                    f"llama-perplexity wrote {written} bytes of log-probabilities to {logits.parent}, expected {size}: "
                    "the disk is full. Use fewer --chunks, or set TMPDIR to a larger disk."
                )
        return log.perplexity(progress.text, model)

    @until_told(log.LostLines)
    def kl_divergence(
        self, model: Path, logits: Path, *, options: Sequence[str] = (), on_chunk: OnChunk | None = None
    ) -> log.Divergence:
        """How far `model` is from the model whose `perplexity` run wrote `logits`, on that run's tokens."""
        if not logits.is_file():
            raise OutputError(f"{logits} does not exist; `perplexity(…, logits=…)` of the reference writes it.")
        context = log.logits_context(logits)
        progress = log.Progress(model, None, on_chunk)
        arguments: list[str | Path] = [
            *options,
            "-c",
            str(context),
            "--kl-divergence-base",
            logits.absolute(),
            "--kl-divergence",
        ]
        self._measure("llama-perplexity", model, arguments, progress)
        return log.divergence(progress.text, model)

    @until_told(log.LostLines)
    def rates(self, model: Path, *, prompt: int, new: int, rounds: int) -> tuple[list[float], list[float]]:
        """`llama-bench`: tokens per second in each of `rounds`, reading `prompt` tokens and writing `new` ones."""
        if not (self.bin_folder / BENCH).is_file():
            raise LlamaCppError(
                f"Speed is measured by {BENCH}, which {self.bin_folder} lacks. Run `qronos-export llamacpp install`, "
                "build that target there too, or leave out --speed."
            )
        threads = ["-t", str(self.threads)] if self.threads else []
        sizes = ["-p", str(prompt), "-n", str(new), "-r", str(rounds)]
        return log.rates(self._run(BENCH, ["-m", _model(model), *sizes, *threads, "-o", "jsonl"]), model)

    def _evaluate(
        self,
        tool: str,
        model: Path,
        text: Path,
        context: int,
        chunks: int | None,
        options: Sequence[str | Path],
        progress: log.Progress,
    ) -> None:
        if not text.is_file():
            raise CalibrationError(f"{text} does not exist; expected a text file in UTF-8.")
        if context < 4 or (chunks is not None and chunks < 1):
            raise UsageError(f"Cannot measure {chunks} chunks of {context} tokens: at least one chunk of 4 is needed.")
        part = [] if chunks is None else ["--chunks", str(chunks)]
        self._measure(tool, model, ["-f", text.absolute(), "-c", str(context), *part, *options], progress)

    def _measure(self, tool: str, model: Path, arguments: Sequence[str | Path], progress: log.Progress) -> None:
        threads = ["-t", str(self.threads)] if self.threads else []
        # A NaN among the weights need not show in the result: rounding activations to 8 bits can swallow it.
        self._run(tool, ["-m", _model(model), "--check-tensors", *arguments, *threads, "--log-jsonl"], progress.feed)
        progress.raise_errors()

    @until_told(SilentError)
    def _run(self, tool: str, arguments: Sequence[str | Path], on_line: Callable[[str], None] | None = None) -> str:
        command = [self.bin_folder / tool, *arguments]
        # OpenMP's threads spin at barriers; where something else wants the cores that doubles the time.
        sleepy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        return run(
            command,
            time_limit=self.time_limit,
            on_line=on_line,
            environment=sleepy,
            plain=log.plain,
            hint=self._hint(),
        )

    def _hint(self) -> str:
        if self.version.split()[0] == PINNED:
            return ""
        return (
            f"This is llama.cpp {self.version} from {self.origin}; qronos-export is tested with {PINNED}, "
            "which `qronos-export llamacpp install` builds."
        )

    def _quantize_options(
        self,
        ftype: str,
        imatrix: Path | None,
        tensor_types: Mapping[str, str] | None,
        pure: bool,
        options: Sequence[str],
    ) -> list[str | Path]:
        if ftype not in (accepted := self.quantize_types()):
            raise UsageError(f"llama-quantize has no type {ftype!r}; it accepts {', '.join(accepted)}.")
        how: list[str | Path] = [*options]
        if imatrix is not None:
            how += ["--imatrix", _model(imatrix)]
        for pattern, kind in (tensor_types or {}).items():
            how += ["--tensor-type", f"{pattern}={kind}"]
        return [*how, "--pure"] if pure else how


def part_names(name: str, count: int) -> list[str]:
    """What `LlamaCpp.split` calls the parts of the GGUF file `name`."""
    stem = name.removesuffix(".gguf")
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _model(path: Path) -> Path:
    """Absolute, so that no name is taken for an option; links stay, since a split file finds its parts by name."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a GGUF file.")
    return path.absolute()


def _refused(checkpoint: Path, printed: Sequence[str], version: str) -> CheckpointError | None:
    """The converter's two refusals that are about the model, not about us."""
    text = "\n".join(printed)
    if unknown := re.search(r"Model (\S+) is not supported", text):
        return CheckpointError(
            f"{checkpoint}: llama.cpp {version} does not know the architecture {unknown[1]}, so there is no GGUF form "
            f"of it. A newer llama.cpp may: build one and set {VARIABLE} to its folder."
        )
    if "pre-tokenizer was not recognized" in text:
        fingerprint = re.search(r"chkhsh:\s*(\w+)", text)
        return CheckpointError(
            f"{checkpoint}: llama.cpp {version} does not recognise its tokenizer"
            f"{f' (fingerprint {fingerprint[1]})' if fingerprint else ''}, which it knows by how a test string is "
            "split. Check that tokenizer.json is the original one, or use a llama.cpp that knows it."
        )
    return None


@contextmanager
def _without_card(checkpoint: Path) -> Iterator[Path]:
    """A folder of the same name with links to all files of `checkpoint` but its model card."""
    with tempfile.TemporaryDirectory(prefix="qronos-export-") as scratch:
        bare = Path(scratch) / checkpoint.resolve().name
        bare.mkdir()
        for file in checkpoint.absolute().iterdir():
            if file.name != CARD:
                (bare / file.name).symlink_to(file)
        yield bare


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A name beside `destination` to write to, which takes its place on success and vanishes on failure."""
    if not destination.parent.is_dir():
        raise OutputError(f"Cannot write {destination}: the folder {destination.parent} does not exist.")
    partial = destination.absolute().with_name(f".partial-{os.getpid()}-{destination.name}")
    try:
        yield partial
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
