"""`qronos-export card`."""

from __future__ import annotations

from typing import Annotated

import typer

from qronos_export.commands.options import ResultsArgument


def card(
    folder: ResultsArgument,
    repository: Annotated[
        str | None, typer.Argument(help="Where it will be published, for the commands in it.", metavar="OWNER/NAME")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md in DIR.")] = False,
) -> None:
    """Write the model card, DIR/README.md: metadata, files, how they were measured and made, how to run them."""
    from qronos_export.card import CARD, write_card
    from qronos_export.errors import OutputError
    from qronos_export.results import open_results

    results = open_results(folder)
    if (folder / CARD).exists() and not force:
        raise OutputError(f"{folder / CARD} exists already; use --force to replace it.")
    typer.echo(write_card(results, repository))
