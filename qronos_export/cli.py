"""The commands together, and how the program ends.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from qronos_export import __version__
from qronos_export.commands.card import card
from qronos_export.commands.compare import compare
from qronos_export.commands.convert import convert
from qronos_export.commands.evaluate import evaluate
from qronos_export.commands.formats import formats
from qronos_export.commands.inspect import inspect
from qronos_export.commands.llamacpp import llamacpp_app
from qronos_export.commands.plan import plan
from qronos_export.commands.publish import publish
from qronos_export.commands.quantize import quantize
from qronos_export.commands.recipe import recipe_app
from qronos_export.commands.report import report
from qronos_export.commands.validate import validate
from qronos_export.errors import QronosError, UsageError

app = typer.Typer(
    name="qronos-export",
    help="Quantize a Hugging Face checkpoint with Qronos into files that run in llama.cpp, and prove them there.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(quantize)
app.command()(plan)
app.command()(convert)
app.command()(validate)
app.command()(compare)
app.command()(evaluate)
app.command()(card)
app.command()(publish)
app.command()(inspect)
app.command()(report)
app.command()(formats)
app.add_typer(llamacpp_app, name="llamacpp")
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


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: object) -> NoReturn:
    """Ends the program by an exception; from then on such signals do nothing, so that what follows is finished."""
    for each in _ENDING:
        signal.signal(each, lambda *_: None)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def main() -> None:
    """The console entry point: errors of ours become one message and an exit code, others a bug report. Ctrl-C exits
    with 130, SIGTERM with 143, SIGHUP with 129, after everything that was begun has been cleared away."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: busy waiting on a shared core costs eight times
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # half a MB for each shape; experts have many
    for each in _ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup has SIGHUP, and a shell Ctrl-C of what it runs aside
            signal.signal(each, _end)
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
