"""What several commands share: options, settings of a recipe, tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qronos_export.errors import UsageError
from qronos_export.recipe import Recipe, plain_value


def setting(name: str, help: str, **more: Any) -> Any:
    """An option that overrides the recipe's `name`; the recipe owns the default."""
    return typer.Option(help=help, show_default=str(getattr(Recipe, name)), **more)


LlamaCppOption = Annotated[
    Path | None, typer.Option("--llamacpp", help="Folder of llama.cpp's tools; otherwise found.", metavar="FOLDER")
]
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


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
