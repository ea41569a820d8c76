"""`qronos-export recipe`: list, show."""

from __future__ import annotations

from typing import Annotated

import typer

from qronos_export.commands.options import table
from qronos_export.errors import UsageError
from qronos_export.recipe import shipped

recipe_app = typer.Typer(help="Recipes that come with the program.", no_args_is_help=True, rich_markup_mode=None)


@recipe_app.command("list")
def list_recipes() -> None:
    """Recipes that come with the program."""
    table(
        *(
            (name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
            for name, path in shipped().items()
        )
    )


@recipe_app.command("show")
def show(name: Annotated[str, typer.Argument(help="One of `recipe list`.")]) -> None:
    """Print a recipe; what it does not name is the default, see `quantize --help`. A copy of it can be changed."""
    if name not in shipped():
        raise UsageError(f"There is no recipe {name!r}; there are {', '.join(shipped())}.")
    typer.echo(shipped()[name].read_text(encoding="utf-8"), nl=False)
