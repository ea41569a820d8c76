"""What several commands share: options, settings of a recipe, and how results and progress are drawn."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qronos_export.errors import UsageError
from qronos_export.recipe import Recipe, plain_value

if TYPE_CHECKING:
    from rich.progress import Progress


def setting(name: str, help: str, **more: Any) -> Any:
    """An option that overrides the recipe's `name`; the recipe owns the default."""
    return typer.Option(help=help, show_default=str(getattr(Recipe, name)), **more)


LlamaCppOption = Annotated[
    Path | None, typer.Option("--llamacpp", help="Folder of llama.cpp's tools; otherwise found.", metavar="FOLDER")
]
ContextOption = Annotated[int, typer.Option("--context", help="Tokens a chunk.")]
ChunksOption = Annotated[int | None, typer.Option("--chunks", help="Chunks to validate on at most.")]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="Held-out text to validate on; otherwise English that Python ships.", metavar="FILE"),
]
CacheKOption = Annotated[
    str | None,
    typer.Option("--cache-type-k", help="Type of keys while validating; else the recipe's or f16.", metavar="TYPE"),
]
CacheVOption = Annotated[
    str | None,
    typer.Option("--cache-type-v", help="Type of values while validating; else the recipe's or f16.", metavar="TYPE"),
]


def cache_types(k: str | None, v: str | None) -> dict[str, str]:
    return {which: kind for which, kind in (("k", k), ("v", v)) if kind is not None}


RecipeOption = Annotated[
    str | None, typer.Option(help="YAML of settings, a report.json, or one of `recipe list`.", metavar="FILE|NAME")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Anything of the recipe; wins over its file.", metavar="KEY=VALUE"),
]


def override_of(given: str) -> tuple[str, str]:
    glob, separator, kind = given.rpartition("=")
    if not (glob and separator and kind):
        raise UsageError(f"--override {given} is not GLOB=TYPE; write for example --override 'blk.*.ffn_down.*=Q6_K'.")
    return glob, kind


def setting_of(given: str) -> tuple[str, Any]:
    key, separator, value = given.partition("=")
    if not (separator and key):
        raise UsageError(f"--set {given} is not KEY=VALUE; write for example --set format=INT4_G128.")
    return key, plain_value(value)


def table(*rows: tuple[str, str]) -> None:
    from rich.table import Table

    drawn = Table(box=None, show_header=False, pad_edge=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console().print(drawn)


def console(**more: Any) -> Any:
    """Tables fit a terminal; in files and pipes a row stays one line."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else 10_000
    return Console(highlight=False, markup=False, soft_wrap=not terminal, width=width, **more)


def progress() -> Progress:
    """A bar with the stage, the layer and its error, and the time left; on standard error, output stays clean."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
