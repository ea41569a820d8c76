"""What several commands share: options, settings of a recipe, and how results and progress are drawn."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qronos_export.errors import UsageError
from qronos_export.recipe import RECIPE_FIELDS, Recipe, load_recipe, plain_value, recipe_from

if TYPE_CHECKING:
    from rich.progress import Progress


def setting(name: str, help: str, **more: Any) -> Any:
    """An option that overrides the recipe's `name`; the recipe owns the default."""
    return typer.Option(help=help, show_default=str(getattr(Recipe, name)), **more)


ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder with config.json and safetensors, hub id, float .gguf, or `demo`.")
]
ResultsArgument = Annotated[Path, typer.Argument(help="What `quantize` wrote.", metavar="DIR")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ReplaceOption = Annotated[bool, typer.Option("--force", help="Replace results in DIR.")]
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
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(help="Type of the tensors a glob fits; the first that fits counts.", metavar="GLOB=TYPE"),
]
OutputTypeOption = Annotated[str | None, typer.Option(help="Type of the output matrix; otherwise the mix's.")]
EmbeddingTypeOption = Annotated[str | None, typer.Option(help="Type of the embedding; otherwise the mix's.")]
PureOption = Annotated[bool | None, typer.Option("--pure", help="One type for all tensors, no mix.")]
MethodOption = Annotated[str | None, setting("method", "qronos, gptaq, gptq (ldlq), gpfq or rtn.")]
SamplesOption = Annotated[int | None, setting("samples", "Calibration sequences.")]
SequenceLengthOption = Annotated[int | None, setting("sequence_length", "Tokens a sequence.")]
MicroBatchOption = Annotated[int | None, setting("micro_batch", "Sequences run at a time.")]
MatchLengthsOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts, one a line or .jsonl record: sequences get their median length, samples make up.", metavar="FILE"
    ),
]
AttentionAwareOption = Annotated[
    bool | None,
    typer.Option(
        help="Round q, k and v by what attention does with their outputs; slower.", show_default="with qronos"
    ),
]
ACCURACY = "How ONNX multiplies: 4 with inputs rounded to int8, 0 in float."
OffloadOption = Annotated[
    str | None, setting("offload", "Where hidden states wait between blocks: none, cpu or disk; less memory, slower.")
]
DeviceOption = Annotated[str | None, setting("device", "auto, cpu, cuda or cuda:i.")]


def recipe_of(arguments: Mapping[str, Any]) -> Recipe:
    """What all `arguments` of a command, by name, ask for together: its options, then --set, then --recipe."""
    given = dict(setting_of(each) for each in arguments["settings"] or [])
    given |= {name: value for name, value in arguments.items() if name in RECIPE_FIELDS and value is not None}
    if arguments["override"]:
        given["overrides"] = overrides = dict(override_of(each) for each in arguments["override"])
        if len(overrides) < len(arguments["override"]):
            raise UsageError("--override names a glob twice; the first type that fits a tensor counts.")
    recipe = arguments["recipe"]
    return load_recipe(recipe, **given) if recipe else recipe_from(given, "The command line")


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


def counted(count: int, what: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def substitute_rows(substitutes: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Rows of a table: the types of tensors whose `wanted` type's blocks do not divide their rows."""
    found = Counter((each["wanted"], each["type"]) for each in substitutes)
    rows = []
    for (wanted, used), count in found.items():
        verb, whose = ("is", "its") if count == 1 else ("are", "their")
        said = f"{counted(count, 'tensor')} {verb} {used}: {wanted}'s blocks do not divide {whose} rows"
        rows.append(("substitutes", said))
    return rows


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
