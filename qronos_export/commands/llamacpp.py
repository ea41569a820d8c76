"""`qronos-export llamacpp`: install, where."""

from __future__ import annotations

import typer

from qronos_export.commands.options import LlamaCppOption, progress, table

llamacpp_app = typer.Typer(help="The llama.cpp behind this tool.", no_args_is_help=True, rich_markup_mode=None)


@llamacpp_app.command("install")
def install() -> None:
    """Build the pinned llama.cpp into the cache; a few minutes, once."""
    from qronos_export.llamacpp_build import install as build

    with progress() as bar:
        task = bar.add_task("build llama.cpp", total=None, detail="")
        found = build(on_line=lambda line: bar.update(task, detail=line[:80]))
        bar.remove_task(task)
    typer.echo(f"{found.bin_folder}  llama.cpp {found.version}")


@llamacpp_app.command("where")
def where(llamacpp: LlamaCppOption = None) -> None:
    """Print the tools that would be used, their version, and why these."""
    from qronos_export.llamacpp_find import find

    found = find(llamacpp)
    table(
        ("tools", str(found.bin_folder)),
        ("version", found.version),
        ("converter", str(found.source or "none: run `qronos-export llamacpp install`")),
        ("found by", found.origin),
    )
