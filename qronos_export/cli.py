"""Arguments in, a recipe out; events in, a progress bar out. Nothing else lives here.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qronos_export import __version__
from qronos_export.commands.card import card
from qronos_export.commands.compare import compare
from qronos_export.commands.inspect import inspect
from qronos_export.commands.options import (
    CacheKOption,
    CacheVOption,
    ChunksOption,
    ContextOption,
    DeviceOption,
    EmbeddingTypeOption,
    JsonOption,
    LlamaCppOption,
    MethodOption,
    MicroBatchOption,
    ModelArgument,
    OutputTypeOption,
    OverrideOption,
    PureOption,
    RecipeOption,
    ReplaceOption,
    SamplesOption,
    SequenceLengthOption,
    SetOption,
    TextOption,
    cache_types,
    console,
    counted,
    recipe_of,
    setting,
    setting_of,
    substitute_rows,
    table,
)
from qronos_export.commands.options import progress as _progress
from qronos_export.commands.plan import plan
from qronos_export.commands.publish import publish
from qronos_export.commands.report import report
from qronos_export.commands.validate import validate
from qronos_export.errors import QronosError, UsageError
from qronos_export.recipe import Recipe, load_recipe, recipe_from, shipped

if TYPE_CHECKING:
    from qronos_export.proof import Held
    from qronos_export.ranks import Ranks
    from qronos_export.report import RunReport

app = typer.Typer(
    name="qronos-export",
    help="Quantize a Hugging Face checkpoint with Qronos into files that run in llama.cpp, and prove them there.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
llamacpp_app = typer.Typer(help="The llama.cpp behind this tool.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(llamacpp_app, name="llamacpp")
recipe_app = typer.Typer(help="Recipes that come with the program.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qronos-export {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.", metavar="DIR")],
    model: ModelArgument = None,
    format: Annotated[
        str | None, setting("format", "Types or mixes by llama.cpp's names, comma separated; a file for each.")
    ] = None,
    artifact: Annotated[
        str | None,
        setting(
            "artifact",
            "What to write, comma separated: gguf, onnx (onnxruntime-genai), onnx-js (transformers.js), onnx-plain, "
            "onnx-mx (opset 24).",
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None, setting("accuracy_level", "How ONNX multiplies: 4 with inputs rounded to int8, 0 in float.")
    ] = None,
    override: OverrideOption = None,
    output_type: OutputTypeOption = None,
    embedding_type: EmbeddingTypeOption = None,
    pure: PureOption = None,
    transforms: Annotated[
        str | None,
        setting(
            "transforms",
            "Done to the weights before, comma separated: hadamard, hadamard-r2, spinquant, smoothquant, awq, aqas, "
            "equalize, permute; or none. auto: equalize, unless the method is rtn.",
        ),
    ] = None,
    spin_steps: Annotated[int | None, setting("spin_steps", "How often spinquant moves its rotations.")] = None,
    method: MethodOption = None,
    calibration: Annotated[
        str | None, setting("calibration", "Text file, hf:NAME[:CONFIG[:SPLIT]], or self: sampled from the model.")
    ] = None,
    samples: SamplesOption = None,
    sequence_length: SequenceLengthOption = None,
    match_lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompts, one a line or .jsonl record: sequences get their median length, samples make up.",
            metavar="FILE",
        ),
    ] = None,
    seed: Annotated[int | None, setting("seed", "Of the choice or sampling of text.")] = None,
    damping: Annotated[float | None, setting("damping", "λ as a share of mean(diag H).")] = None,
    shrinkage: Annotated[
        float | None, setting("shrinkage", "How far the measured mismatch of the streams is trusted, 0 to 1.")
    ] = None,
    ridge: Annotated[
        float | None, setting("ridge", "ρ of that correction as a share of mean(diag H); more for less text.")
    ] = None,
    magr: Annotated[float | None, setting("magr", "MagR's α, for few bits: how much of extremes is given up.")] = None,
    order: Annotated[
        str | None, setting("order", "Columns: natural, descending, min_pivot, or blocks: heavy ones first.")
    ] = None,
    attention_aware: Annotated[
        bool | None,
        typer.Option(
            help="Round q, k and v by what attention does with their outputs; slower.", show_default="with qronos"
        ),
    ] = None,
    micro_batch: MicroBatchOption = None,
    device: DeviceOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 40,
    cache_type_k: CacheKOption = None,
    cache_type_v: CacheVOption = None,
    validate: Annotated[bool, typer.Option("--validate/--no-validate", help="Run llama.cpp on the result.")] = True,
    force: ReplaceOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished in DIR until all is, and go on behind it.")
    ] = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Quantize MODEL into DIR/<model>-<FORMAT>.gguf, one for each format, and DIR/report.json; ONNX models get folders
    beside them."""
    wanted = recipe_of(locals())

    from qronos_export.followers import follow
    from qronos_export.proof import Held
    from qronos_export.ranks import joined
    from qronos_export.resume import FOLDER

    held = Held(text, context, chunks, cache_types(cache_type_k, cache_type_v))
    with joined() as ranks, _resumable(output / FOLDER if resume else None):
        if not ranks.first:
            follow(ranks)
            return
        result, folder = _watched(wanted, output, held if validate else None, llamacpp, force, resume, ranks)
    _summary(result, folder)


def _watched(
    recipe: Recipe, output: Path, held: Held | None, llamacpp: Path | None, force: bool, resume: bool, ranks: Ranks
) -> tuple[RunReport, Path]:
    """A run with its bar."""
    from qronos_export.events import Finished, Resumed, Stage, Step
    from qronos_export.llamacpp_find import find
    from qronos_export.pipeline import run

    with _progress() as progress:
        task = progress.add_task("start", total=None, detail="")

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        events = run(
            recipe, output, llamacpp=find(llamacpp), held=held, force=force, resume=resume, on_progress=on_progress,
            ranks=ranks,
        )  # fmt: skip
        with closing(events):
            for event in events:
                if isinstance(event, Stage):
                    progress.reset(task, total=event.steps, description=event.name, detail="")
                elif isinstance(event, Resumed):
                    redone = f"; damaged and made again: {', '.join(event.damaged)}" if event.damaged else ""
                    progress.console.print(f"resumed after {event.done} steps{redone}", markup=False, highlight=False)
                elif isinstance(event, Step):
                    layer = event.layer
                    detail = (
                        "" if layer is None else f"{layer.tensor} {layer.method} error {_number(layer.error, '.4f')}"
                    )
                    progress.update(task, completed=event.done, detail=detail)
                elif isinstance(event, Finished):
                    progress.remove_task(task)
                    result, folder = event.report, event.folder
    return result, folder


@contextmanager
def _resumable(state: Path | None) -> Iterator[None]:
    """Says how to go on where a signal ends a run that leaves `state`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if state and state.is_dir():
            typer.echo(f"resume with: {shlex.join(['qronos-export', *sys.argv[1:]])}", err=True)
        raise


app.command()(plan)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A quantized .gguf, ours or another.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", metavar="DIR")],
    artifact: Annotated[
        str,
        typer.Option(
            help="onnx (onnxruntime-genai), onnx-js (transformers.js), onnx-plain, onnx-mx (opset 24); comma separated."
        ),
    ] = "onnx",
    accuracy_level: Annotated[
        int, typer.Option(help="How ONNX multiplies: 4 with inputs rounded to int8, 0 in float.")
    ] = 4,
    like: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id with its configuration and tokenizer; else read from FILE.", metavar="MODEL"
        ),
    ] = None,
    force: ReplaceOption = False,
) -> None:
    """Write FILE's own integers and scales as ONNX, into DIR/<its name>-<ARTIFACT>. Nothing is rounded again."""
    from qronos_export.conversion import convert as run_conversion
    from qronos_export.events import Stage

    layouts = [name.strip().lower() for name in artifact.split(",")]
    rows: list[tuple[str, str]] = []
    with _progress() as progress:
        task = progress.add_task("start", total=None, detail="")
        for event in run_conversion(file, output, layouts, accuracy_level=accuracy_level, like=like, force=force):
            if isinstance(event, Stage):
                progress.reset(task, total=event.steps, description=event.name, detail="")
            else:
                written, notes = event
                rows += [
                    ("model", str(output / written.path)),
                    ("size", f"{written.bytes / 1e6:.1f} MB, {written.bits_per_weight:.3f} bits a weight"),
                    *(("note", note) for note in notes),
                ]
        progress.remove_task(task)
    table(*rows)


app.command()(validate)
app.command()(compare)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, hub id, .gguf or `demo`.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 40,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks by lm-eval's names, comma separated.", metavar="NAME[,NAME…]")
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="YAML files of lm-eval tasks of your own.", metavar="FOLDER")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL in torch, by llama.cpp's protocol; with a recipe, what becomes of it, without writing a file.

    All linear layers of the blocks get the recipe's type, a key of `formats` or a grid such as INT4_G128; embedding and
    output matrix stay float. --tasks scores both models in lm-eval besides, and takes memory for all of their weights.
    """
    given = dict(setting_of(each) for each in settings or []) | {"model": model}
    wanted = load_recipe(recipe, **given) if recipe else recipe_from(given, "--set") if settings else None
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UsageError(f"--tasks is {tasks!r}; expected names such as hellaswag,arc_easy.")
    if tasks_folder and not names:
        raise UsageError("--tasks-folder is given without --tasks; name the tasks in it that are to be run.")

    from qronos_export.evaluation import Evaluated
    from qronos_export.evaluation import evaluate as run_evaluation
    from qronos_export.events import Stage, Step
    from qronos_export.proof import Held

    with _progress() as progress:
        task = progress.add_task("start", total=None, detail="")
        for event in run_evaluation(
            model,
            wanted,
            Held(text, context, chunks),
            tasks=names,
            tasks_folder=tasks_folder,
            device=device,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        ):
            if isinstance(event, Stage):
                progress.reset(task, total=event.steps, description=event.name, detail="")
            elif isinstance(event, Step):
                progress.update(task, completed=event.done, detail=event.layer.name if event.layer else "")
            elif isinstance(event, Evaluated):
                progress.remove_task(task)
                done, result, notes = event, event.evaluation, event.notes
    if as_json:
        scores = {"scores_reference": done.scores_reference, "scores": done.scores}
        typer.echo(json.dumps({**result.to_json(), "notes": notes, **scores}, indent=2))
        return
    rows = [
        ("perplexity of the model", f"{result.perplexity_reference:.4f} ± {result.perplexity_reference_error:.4f}"),
        ("measured on", f"{result.chunks} chunks of {result.context} tokens"),
    ]
    if result.perplexity is not None:
        rows[1:1] = [
            ("  of the recipe", f"{result.perplexity:.4f} ± {result.perplexity_error:.4f}"),
            ("KL divergence", f"{result.kl_divergence:.5f} ± {result.kl_divergence_error:.5f} nats"),
            ("same top token", f"{result.same_top:.2f} %"),
        ]
    for name, row in (done.scores_reference or {}).items():
        rows += [(f"{name} {metric}", shown) for metric, shown in _scored(row)]
        if done.scores:
            rows += [(f"  {metric} of the recipe", shown) for metric, shown in _scored(done.scores[name])]
    rows += [("note", note) for note in notes[:5]]
    if len(notes) > 5:
        rows.append(("", f"{counted(len(notes) - 5, 'more note')} with --json"))
    table(*rows)


def _scored(row: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Metrics of a task as they are shown, their standard errors beside them."""
    for key, value in row.items():
        metric, _, rule = key.partition(",")
        if not metric.endswith("_stderr"):
            error = row.get(f"{metric}_stderr,{rule}")
            label = metric if rule == "none" else f"{metric} ({rule})"
            yield label, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


app.command()(card)
app.command()(publish)
app.command()(inspect)
app.command()(report)


@recipe_app.command("list")
def recipe_list() -> None:
    """Recipes that come with the program."""
    table(
        *(
            (name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
            for name, path in shipped().items()
        )
    )


@recipe_app.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="One of `recipe list`.")]) -> None:
    """Print a recipe; what it does not name is the default, see `quantize --help`. A copy of it can be changed."""
    if name not in shipped():
        raise UsageError(f"There is no recipe {name!r}; there are {', '.join(shipped())}.")
    typer.echo(shipped()[name].read_text(encoding="utf-8"), nl=False)


@app.command()
def formats() -> None:
    """The support matrix."""
    from rich.table import Table

    from formats import FORMATS
    from formats.compiled import how

    table = Table("format", "bits per weight", "block", "bytes a block", "how", box=None, pad_edge=False)
    for fmt in FORMATS.values():
        methods = "kept as it is" if fmt.is_float else "rtn, gpfq, gptq, gptaq, qronos"
        if fmt.ggml_type is None:
            methods = "no GGUF type; ONNX or torch"
        table.add_row(fmt.name, f"{fmt.bits_per_weight:g}", str(fmt.block_size), str(fmt.block_bytes), methods)
    console().print(table)
    typer.echo(f"\nScales on the CPU are searched by: {how()}")


@llamacpp_app.command("install")
def llamacpp_install() -> None:
    """Build the pinned llama.cpp into the cache; a few minutes, once."""
    from qronos_export.llamacpp_build import install

    with _progress() as progress:
        task = progress.add_task("build llama.cpp", total=None, detail="")
        found = install(on_line=lambda line: progress.update(task, detail=line[:80]))
        progress.remove_task(task)
    typer.echo(f"{found.bin_folder}  llama.cpp {found.version}")


@llamacpp_app.command("where")
def llamacpp_where(llamacpp: LlamaCppOption = None) -> None:
    """Print the tools that would be used, their version, and why these."""
    from qronos_export.llamacpp_find import find

    found = find(llamacpp)
    table(
        ("tools", str(found.bin_folder)),
        ("version", found.version),
        ("converter", str(found.source or "none: run `qronos-export llamacpp install`")),
        ("found by", found.origin),
    )


def _summary(result: RunReport, folder: Path) -> None:
    rows: list[tuple[str, str]] = []
    summed: set[str] = set()  # formats, of which several artifacts may be there
    for artifact in result.artifacts:
        rows += [
            ("file", str(folder / artifact.path)),
            ("size", f"{artifact.bytes / 1e6:.1f} MB, {artifact.bits_per_weight:.3f} bits a weight"),
        ]
        if checked := artifact.validation:
            rows += [
                ("perplexity", f"{checked['perplexity']:.3f}, float {checked['perplexity_reference']:.3f}"),
                ("KL divergence", f"{checked['kl_divergence']:.4f} ± {checked['kl_divergence_error']:.4f}"),
                ("same top token", f"{checked['same_top']:.1f} %"),
            ]
        if artifact.format in summed:
            continue
        summed.add(artifact.format)
        rows += substitute_rows(each for each in result.substitutes if each["artifact"] == artifact.format)
        noted: dict[str, list[str]] = {}
        for layer in sorted(result.layers, key=lambda layer: layer.method == result.recipe["method"]):  # the odd first
            if layer.note and layer.artifact == artifact.format:
                noted.setdefault(layer.note, []).append(layer.tensor)
        for each in result.kept:
            if each["artifact"] == artifact.format:
                noted.setdefault(f"kept as {each['type']}: {each['why']}", []).append(each["tensor"])
        mine = [(names[0] if len(names) == 1 else f"{len(names)} tensors", note) for note, names in noted.items()]
        rows += mine[:5]
        if len(mine) > 5:
            rows.append(("", f"{counted(len(mine) - 5, 'more note')} in report.json"))
    rows += [("note", note) for note in result.notes]
    rows.append(("report", f"{folder / 'report.json'}, {result.seconds['total']:.0f} s in all"))
    table(*rows)


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def main() -> None:
    """The console entry point: errors of ours become one message and an exit code, others a bug report. Ctrl-C exits
    with 130, SIGTERM with 143, after everything that was begun has been cleared away."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    debug = "--debug" in sys.argv[1:]
    if debug:  # wherever it stands
        sys.argv = [sys.argv[0], "--debug", *(argument for argument in sys.argv[1:] if argument != "--debug")]
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except QronosError as error:
        if debug:
            traceback.print_exc()
        kind = "usage" if isinstance(error, UsageError) else "error"
        typer.echo(f"{kind}: {error}", err=True)
        sys.exit(error.exit_code)
