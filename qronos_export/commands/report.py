"""`qronos-export report`: runs as one page that people look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qronos_export.commands.options import LlamaCppOption
from qronos_export.errors import UsageError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `quantize` filled.", metavar="DIR...")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; else the first DIR.", metavar="FOLDER")
    ] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(
            help="What `compare --json` printed, or `validate --json` with name, bytes, bits; several.", metavar="FILE"
        ),
    ] = None,
    worst: Annotated[
        str | None,
        typer.Option(help="Find each GGUF's worst tokens: run it and this float model once more.", metavar="MODEL"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Text for --worst; otherwise English that Python ships.", metavar="FILE"),
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Tokens a chunk for --worst.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks for --worst at most.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace a report in FOLDER.")] = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Write FOLDER/report.html, one page without scripts or anything to fetch, and its pictures as .png."""
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise UsageError(
            f"A report needs {missing[0]}, which is not installed; run `pip install 'qronos-export[report]'`."
        )

    from rich.console import Console
    from rich.progress import Progress

    from qronos_export.llamacpp_find import find
    from qronos_export.page import write_page
    from qronos_export.proof import Held
    from qronos_export.runs import compare, read_baselines, read_runs
    from qronos_export.validation import Cache
    from qronos_export.worst import WorstTokens, measure

    runs = read_runs(folders)
    baselines = [(path, each) for path in baseline or [] for each in read_baselines(path, runs)]
    comparisons = compare(runs, baselines)
    found: dict[str, WorstTokens] = {}
    if worst is not None:
        held = Held(text, context, chunks)
        if len({run.model for run in runs}) > 1:
            raise UsageError("--worst is one float model and the DIRs are of several; report on them one by one.")
        files = {
            f"{run.name}/{artifact.path}": (
                run.folder / artifact.path,
                Cache(**{which: known[f"cache_{which}"] for which in "kv" if f"cache_{which}" in known}),
            )
            for run in runs
            for artifact in run.report.artifacts
            if artifact.path in run.stored
            for known in [artifact.validation or {}]
        }
        if not files:
            raise UsageError(f"--worst measures GGUF files, and there is none in {', '.join(map(str, folders))}.")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("start", total=None)
            measured = measure(
                worst, list(files.values()), held, llamacpp=find(llamacpp),
                on_file=lambda name: progress.reset(task, total=None, description=f"worst tokens: {name}"),
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        found = dict(zip(files, measured, strict=True))
    for path in write_page(output or folders[0], runs, comparisons, found, force=force):
        typer.echo(path)
