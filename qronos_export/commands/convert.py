"""`qronos-export convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qronos_export.commands.options import ACCURACY, ReplaceOption, progress, table


def convert(
    file: Annotated[Path, typer.Argument(help="A quantized .gguf, ours or another.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", metavar="DIR")],
    artifact: Annotated[
        str,
        typer.Option(
            help="onnx (onnxruntime-genai), onnx-js (transformers.js), onnx-plain, onnx-mx (opset 24); comma separated."
        ),
    ] = "onnx",
    accuracy_level: Annotated[int, typer.Option(help=ACCURACY)] = 4,
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
    with progress() as bar:
        task = bar.add_task("start", total=None, detail="")
        for event in run_conversion(file, output, layouts, accuracy_level=accuracy_level, like=like, force=force):
            if isinstance(event, Stage):
                bar.reset(task, total=event.steps, description=event.name, detail="")
            else:
                written, notes = event
                rows += [
                    ("model", str(output / written.path)),
                    ("size", f"{written.bytes / 1e6:.1f} MB, {written.bits_per_weight:.3f} bits a weight"),
                    *(("note", note) for note in notes),
                ]
        bar.remove_task(task)
    table(*rows)
