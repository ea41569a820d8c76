"""`inspect`: what a model file holds, as tables or JSON. Strings of the file reach the terminal as visible characters
alone, and never as markup."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qronos_export.commands.options import console, counted
from qronos_export.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qronos_export.inspection.found import Entry, Inspection
    from qronos_export.inspection.numbers import Statistics

_WIDTH = 160  # characters of a value
_TENSORS = 4096  # rows of a table


def inspect(
    file: Annotated[Path, typer.Argument(help="A .gguf, also a part of a split, an .onnx, or a folder with one.")],
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with it; exits 1 where it is an error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON, with statistics of every tensor.")
    ] = False,
    numbers: Annotated[
        bool, typer.Option("--numbers", help="Read all numbers: statistics of every tensor's blocks in the table.")
    ] = False,
) -> None:
    """Metadata, tokenizer, chat template and tensors of FILE, whoever wrote it. Nothing in it is executed.

    --check, --json and --numbers read all of its numbers, some hundred MB of blocks in a few seconds.
    """
    from qronos_export.inspection import inspect as look

    found = look(file, numbers=as_json or numbers, check=check)
    if as_json:
        typer.echo(json.dumps(found.to_json(checked=check), indent=2, allow_nan=False))
    else:
        show(found, console(emoji=False), checked=check)
    if found.errors:
        first = "" if check else f" {_clear(found.errors[0].where)}: {_clear(found.errors[0].what)}."
        raise ArtifactError(f"{file} has {counted(len(found.errors), 'error')}.{first}")


def show(found: Inspection, console: Console, *, checked: bool) -> None:
    """Print all that was found; of a check what it was done on and the findings, a line each."""
    total = found.total
    console.print(
        _table(
            ("file", str(found.path)),
            ("format", found.format),
            ("size", f"{found.bytes:,} bytes"),
            ("tensors", f"{total.tensors}: {total.weights:,} weights, {total.bits_per_weight:.3f} bits each"),
        )
    )
    if checked:
        for finding in found.findings:
            console.print(f"{finding.severity}  {_clear(finding.where)}  {_clear(finding.what)}", soft_wrap=True)
        counts = Counter(finding.severity for finding in found.findings)
        console.print(f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}")
        return
    _section(console, "metadata", _table(*((key, _entry(entry)) for key, entry in found.metadata.items())))
    if found.tokenizer:
        _section(console, "tokenizer", _table(*_tokenizer(found.tokenizer)))
    for key, template in found.chat_templates.items():
        _section(console, f"{_clear(key)}, not executed", "\n".join(_clear(line) for line in template.split("\n")))
    sizes = [
        (each.type, str(each.tensors), f"{each.weights:,}", f"{each.bytes:,}", f"{each.bits_per_weight:.4g}")
        for each in (*found.types, total)
    ]
    _section(console, "types", _table(*sizes, head=("type", "tensors", "weights", "bytes", "bits per weight")))
    head: tuple[str, ...] = ("name", "type", "shape", "bits")
    if any(each.statistics for each in found.tensors):
        head += ("scales", "zero codes", "zero blocks", "rms", "largest")
    rows = [
        (
            each.name,
            each.type,
            " × ".join(map(str, each.shape)),
            _bits(each.bits_per_weight),
            *_numbers(each.statistics),
        )
        for each in found.tensors[:_TENSORS]
    ]
    _section(console, "tensors", _table(*rows, head=head))
    if len(found.tensors) > _TENSORS:
        console.print(f"{len(found.tensors) - _TENSORS} more with --json")


def _tokenizer(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tokenizer.items():
        if key != "special":
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for name, token in tokenizer.get("special", {}).items():
        text = "" if token["token"] is None else json.dumps(_clear(token["token"]), ensure_ascii=False)
        yield f"  {name}", f"{'' if token['id'] is None else token['id']} {text}".strip()


def _entry(entry: Entry) -> str:
    """A value in a line, long ones shortened."""
    if isinstance(entry.value, dict):
        return ", ".join(f"{key} {value}" for key, value in entry.value.items())
    if entry.kind.startswith("array"):
        more = ", …" if (entry.count or 0) > len(entry.value) else ""
        return f"{entry.count} × {entry.kind.removeprefix('array of ')}: " + ", ".join(map(str, entry.value)) + more
    return str(entry.value)


def _bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.4g}"


def _numbers(of: Statistics | None) -> Iterator[str]:
    if of is None:
        return
    found = of.to_json()
    yield " … ".join(f"{scale:.3g}" for scale in found.get("scale_range") or ())
    yield from ("" if found.get(key) is None else f"{found[key]:.2%}" for key in ("zero_codes", "zero_blocks"))
    yield from ("" if found.get(key) is None else f"{found[key]:.4g}" for key in ("rms", "largest"))


def _clear(text: str, width: int | None = None) -> str:
    from qronos_export.inspection.found import shown

    text = shown(text if width is None else text[: width + 1])
    return text if width is None or len(text) <= width else f"{text[:width]}…"


def _section(console: Console, title: str, content: Any) -> None:
    console.print()
    console.print(f"{title}:")
    console.print(content)


def _table(*rows: tuple[str, ...], head: tuple[str, ...] = ()) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, show_header=bool(head), pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_clear(cell, _WIDTH), overflow="fold") for cell in row))
    return table
