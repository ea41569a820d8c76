"""`qronos-export plan`: what `quantize` would write, hold and take, without running it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qronos_export.commands.options import (
    AttentionAwareOption,
    DeviceOption,
    EmbeddingTypeOption,
    LlamaCppOption,
    MatchLengthsOption,
    MethodOption,
    MicroBatchOption,
    ModelArgument,
    OffloadOption,
    OutputTypeOption,
    OverrideOption,
    PureOption,
    RecipeOption,
    SamplesOption,
    SequenceLengthOption,
    SetOption,
    recipe_of,
    setting,
    substitute_rows,
    table,
)

if TYPE_CHECKING:
    from qronos_export.forecast import Forecast


def plan(
    model: ModelArgument = None,
    format: Annotated[str | None, setting("format", "Types or mixes, comma separated; a file for each.")] = None,
    artifact: Annotated[str | None, setting("artifact", "As for quantize.")] = None,
    override: OverrideOption = None,
    output_type: OutputTypeOption = None,
    embedding_type: EmbeddingTypeOption = None,
    pure: PureOption = None,
    transforms: Annotated[str | None, setting("transforms", "As for quantize.")] = None,
    method: MethodOption = None,
    calibration: Annotated[str | None, setting("calibration", "As for quantize; no text is read.")] = None,
    samples: SamplesOption = None,
    sequence_length: SequenceLengthOption = None,
    match_lengths: MatchLengthsOption = None,
    attention_aware: AttentionAwareOption = None,
    micro_batch: MicroBatchOption = None,
    offload: OffloadOption = None,
    device: DeviceOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, with every tensor's type.")] = False,
    llamacpp: LlamaCppOption = None,
) -> None:
    """Say what quantizing MODEL would write, and what memory, disk and time it would take; a minute, and no weights."""
    wanted = recipe_of(locals())

    from qronos_export.forecast import forecast
    from qronos_export.llamacpp_find import find

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
        rows += substitute_rows(file.substitutes)
    rows.append(("peak memory", f"{result.peak_memory_bytes / 1e6:,.0f} MB, at: {result.moment}"))
    rows += [(f"  {term}", f"{size / 1e6:,.1f} MB") for term, size in result.memory[result.moment].items()]
    rows += [(f"flops: {what}", f"{count:.3g}") for what, count in result.flops.items() if count]
    rows.append(("disk needed", f"{sum(result.disk.values()) / 1e6:,.0f} MB"))
    rows += [(f"  {what}", f"{size / 1e6:,.1f} MB") for what, size in result.disk.items() if size]
    rows.append(("expected time", f"{sum(result.seconds.values()):,.0f} s, validation not included"))
    rows += [(f"  {phase}", f"{seconds:,.1f} s") for phase, seconds in result.seconds.items()]
    rates = ", ".join(f"{getattr(result.machine, name) / 1e9:,.1f} in {name}" for name in ("float32", "bfloat16"))
    rows.append(("measured", f"GFLOP/s in matrix products on this machine, now: {rates}"))
    rows += [("note", note) for note in result.notes]
    table(*rows)
