"""`qronos-export quantize`: arguments in, a recipe out; events in, a progress bar out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qronos_export.commands.options import (
    ACCURACY,
    AttentionAwareOption,
    CacheKOption,
    CacheVOption,
    ChunksOption,
    ContextOption,
    DeviceOption,
    EmbeddingTypeOption,
    LlamaCppOption,
    MatchLengthsOption,
    MethodOption,
    MicroBatchOption,
    ModelArgument,
    OffloadOption,
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
    counted,
    progress,
    recipe_of,
    setting,
    substitute_rows,
    table,
)
from qronos_export.recipe import Recipe

if TYPE_CHECKING:
    from qronos_export.proof import Held
    from qronos_export.ranks import Ranks
    from qronos_export.report import RunReport


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
    accuracy_level: Annotated[int | None, setting("accuracy_level", ACCURACY)] = None,
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
    match_lengths: MatchLengthsOption = None,
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
    attention_aware: AttentionAwareOption = None,
    micro_batch: MicroBatchOption = None,
    offload: OffloadOption = None,
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

    with progress() as bar:
        task = bar.add_task("start", total=None, detail="")

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        events = run(
            recipe, output, llamacpp=find(llamacpp), held=held, force=force, resume=resume, on_progress=on_progress,
            ranks=ranks,
        )  # fmt: skip
        with closing(events):
            for event in events:
                if isinstance(event, Stage):
                    bar.reset(task, total=event.steps, description=event.name, detail="")
                elif isinstance(event, Resumed):
                    redone = f"; damaged and made again: {', '.join(event.damaged)}" if event.damaged else ""
                    bar.console.print(f"resumed after {event.done} steps{redone}", markup=False, highlight=False)
                elif isinstance(event, Step):
                    layer = event.layer
                    detail = (
                        "" if layer is None else f"{layer.tensor} {layer.method} error {_number(layer.error, '.4f')}"
                    )
                    bar.update(task, completed=event.done, detail=detail)
                elif isinstance(event, Finished):
                    bar.remove_task(task)
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
