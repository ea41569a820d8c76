"""`qronos-export publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qronos_export.commands.options import LlamaCppOption, ResultsArgument


def publish(
    folder: ResultsArgument,
    repository: Annotated[str, typer.Argument(help="Model repository of the hub.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, made where it does not exist.", show_default="main")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show it, and send nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Publish also what was not validated or missed a limit.")
    ] = False,
    max_kld: Annotated[float | None, typer.Option(help="Refuse files above this KL divergence, in nats.")] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Refuse files above this rise of perplexity, in percent.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="YAML of limits that every file must keep, as for validate.", metavar="FILE")
    ] = None,
    split_size: Annotated[
        str, typer.Option(help="GGUF files above this many bytes become several.", metavar="NUMBER M|G")
    ] = "48G",
    llamacpp: LlamaCppOption = None,
) -> None:
    """Publish the files of a run on the Hugging Face hub, with model card and report, as one commit.

    Only proven files: every one validated, within the limits, and with the sha256 of its report. The token is that of
    `hf auth login` or HF_TOKEN. Run again after an interruption, it goes on where it stopped.
    """
    from qronos_export.gate import load_gates
    from qronos_export.llamacpp_find import find
    from qronos_export.publish import megabytes
    from qronos_export.publish import publish as run
    from qronos_export.results import open_results

    uploads, address = run(
        open_results(folder),
        repository,
        private=private,
        revision=revision,
        gates=load_gates(gate, max_kld=max_kld, max_ppl_increase=max_ppl_increase),
        force=force,
        split_size=megabytes(split_size),
        llamacpp=lambda: find(llamacpp),
        dry_run=dry_run,
        say=lambda line: typer.echo(line, err=True),
    )
    for each in uploads:
        typer.echo(f"{each.size:>15,}  {each.name}")
    typer.echo(address or f"nothing was sent to {repository}")
