from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qronos_export.commands.options import (
    ChunksOption,
    ContextOption,
    JsonOption,
    LlamaCppOption,
    TextOption,
    console,
    progress,
)

if TYPE_CHECKING:
    from qronos_export.comparison import Compared, Rate


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="Quantized .gguf files, ONNX models or folders.", metavar="FILE…")
    ],
    reference: Annotated[str, typer.Option(help="Their float model: folder, hub id, .gguf or `demo`.")],
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 40,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second: llama-bench, onnxruntime-genai.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw KL divergence against bits: .png, .svg or .pdf.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Size, perplexity, KL divergence and speed of several files of one model, and which differences are real.

    All files read the same chunks, so differences are taken chunk by chunk; p is Student's t, adjusted for all pairs.
    """
    from qronos_export.comparison import compare as run_comparison
    from qronos_export.comparison import pairs, sentences
    from qronos_export.comparison_plot import check_plot, draw
    from qronos_export.events import Stage
    from qronos_export.llamacpp_find import find
    from qronos_export.proof import Held

    if plot is not None:
        check_plot(plot)
    found: list[Compared] = []
    with progress() as bar:
        task = bar.add_task("start", total=None, detail="")
        for event in run_comparison(
            files,
            reference,
            Held(text, context, chunks),
            find=lambda: find(llamacpp),
            speed=speed,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        ):
            if isinstance(event, Stage):
                bar.reset(task, total=event.steps, description=event.name, detail="")
            else:
                found.append(event)
        bar.remove_task(task)
    differences = pairs(found)
    if plot is not None:
        draw(found, plot)
    if as_json:
        sides = {"files": [each.to_json() for each in found], "pairs": [each.to_json() for each in differences]}
        typer.echo(json.dumps(sides, indent=2))
        return
    _draw_table(found, speed)
    first = found[0].validation
    console().print(
        f"{first.chunks} chunks of {first.context} tokens; float perplexity {first.perplexity_reference:.4f}",
        *sentences(found, differences),
        sep="\n",
    )


def _draw_table(files: Sequence[Compared], speed: bool) -> None:
    from rich.table import Table

    drawn = Table("file", box=None, pad_edge=False)
    for title in ("bytes", "bits", "perplexity", "KL divergence", "same top %"):
        drawn.add_column(title, justify="right")
    if speed:
        drawn.add_column("prompt tokens/s", justify="right")
        drawn.add_column("new tokens/s", justify="right")
    for each in files:
        v = each.validation
        drawn.add_row(
            each.file,
            f"{each.bytes:,}",
            f"{each.bits_per_weight:.3f}",
            f"{v.perplexity:.3f} ± {v.perplexity_error:.3f}",
            f"{v.kl_divergence:.5f} ± {v.kl_divergence_error:.5f}",
            f"{v.same_top:.2f} ± {v.same_top_error:.2f}",
            *((_rate(each.prompt), _rate(each.generation)) if speed else ()),
        )
    console().print(drawn)


def _rate(rate: Rate | None) -> str:
    return "–" if rate is None else f"{rate.mean:.1f} ± {rate.error:.1f}"
