"""`qronos-export plan`: what `quantize` would write, hold and take, without running it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from qronos_export.commands.options import (
    LlamaCppOption,
    RecipeOption,
    SetOption,
    override_of,
    setting,
    setting_of,
    table,
)
from qronos_export.recipe import RECIPE_FIELDS, load_recipe, recipe_from

if TYPE_CHECKING:
    from qronos_export.forecast import Forecast


def plan(
    model: Annotated[
        str | None, typer.Argument(help="Folder with config.json and safetensors, hub id, float .gguf, or `demo`.")
    ] = None,
    format: Annotated[str | None, setting("format", "Types or mixes, comma separated; a file for each.")] = None,
    artifact: Annotated[str | None, setting("artifact", "As for quantize.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Type of the tensors a glob fits; the first that fits counts.", metavar="GLOB=TYPE"),
    ] = None,
    output_type: Annotated[str | None, typer.Option(help="Type of the output matrix; otherwise the mix's.")] = None,
    embedding_type: Annotated[str | None, typer.Option(help="Type of the embedding; otherwise the mix's.")] = None,
    pure: Annotated[bool | None, typer.Option("--pure", help="One type for all tensors, no mix.")] = None,
    transforms: Annotated[str | None, setting("transforms", "As for quantize.")] = None,
    method: Annotated[str | None, setting("method", "qronos, gptaq, gptq (ldlq), gpfq or rtn.")] = None,
    calibration: Annotated[str | None, setting("calibration", "As for quantize; no text is read.")] = None,
    samples: Annotated[int | None, setting("samples", "Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, setting("sequence_length", "Tokens a sequence.")] = None,
    match_lengths: Annotated[
        str | None, typer.Option(help="Prompts, one a line or .jsonl record, for both of these.", metavar="FILE")
    ] = None,
    attention_aware: Annotated[
        bool | None, typer.Option(help="Round q, k and v by what attention does.", show_default="with qronos")
    ] = None,
    micro_batch: Annotated[int | None, setting("micro_batch", "Sequences run at a time.")] = None,
    device: Annotated[str | None, setting("device", "auto, cpu, cuda or cuda:i.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, with every tensor's type.")] = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Say what quantizing MODEL would write, and what memory, disk and time it would take; a minute, and no weights."""
    given = {name: value for name, value in locals().items() if name in RECIPE_FIELDS and value is not None}
    given = dict(setting_of(each) for each in settings or []) | given
    if override:
        given["overrides"] = dict(override_of(each) for each in override)
    wanted = load_recipe(recipe, **given) if recipe else recipe_from(given, "The command line")

    from qronos_export.forecast import forecast
    from qronos_export.llamacpp import find

    result = forecast(wanted, find(llamacpp))
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        _show(result)


def _show(result: Forecast) -> None:
    rows: list[tuple[str, str]] = []
    for file in result.files:
        rows += [
            ("file", file.name),
            ("size", f"{file.bytes:,} bytes, {file.bits_per_weight:.3f} bits a weight"),
            ("types", ", ".join(f"{count} {kind}" for kind, count in file.counts.items())),
        ]
        instead = Counter((each["wanted"], each["type"]) for each in file.substitutes)
        rows += [
            ("substitutes", f"{count} tensors are {used}: {wanted}'s blocks do not divide their rows")
            for (wanted, used), count in instead.items()
        ]
    rows.append(("peak memory", f"{result.peak_memory_bytes / 1e6:,.0f} MB, at: {result.moment}"))
    rows += [(f"  {term}", f"{size / 1e6:,.1f} MB") for term, size in result.memory[result.moment].items()]
    rows += [(f"flops: {what}", f"{count:.3g}") for what, count in result.flops.items() if count]
    rows.append(("disk needed", f"{sum(result.disk.values()) / 1e6:,.0f} MB"))
    rows += [(f"  {what}", f"{size / 1e6:,.1f} MB") for what, size in result.disk.items() if size]
    rows.append(("expected time", f"{sum(result.seconds.values()):,.0f} s, validation not included"))
    rows += [(f"  {phase}", f"{seconds:,.1f} s") for phase, seconds in result.seconds.items()]
    rows.append(("measured", f"{result.machine.float32 / 1e9:,.1f} GFLOP/s in float32 products on this machine, now"))
    rows += [("note", note) for note in result.notes]
    table(*rows)
