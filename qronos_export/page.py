"""One page about runs, for people: everything their reports hold, the pictures inside it, nothing fetched and nothing
run. Numbers are <data> elements, so that the exact one is there beside the rounded one.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from qronos_export import figures
from qronos_export.report import LayerReport
from qronos_export.runs import Comparison, Run, kind_of, printable
from qronos_export.workspace import workspace
from qronos_export.worst import WorstTokens

PAGE = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Picture:
    """The name of a picture's file beside the page, what it shows, in words, and itself."""

    name: str
    caption: str
    svg: bytes
    png: bytes

    def source(self, dark: bool) -> str:
        """The picture as an address that holds it."""
        svg = figures.dark(self.svg) if dark else self.svg
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


@dataclass(frozen=True)
class KindError:
    """Errors of a kind of tensor in one artifact: means over its tensors, and the one that is largest."""

    artifact: str
    kind: str
    types: list[str]
    tensors: int
    error: float
    largest: float
    largest_in: str
    mismatch: float | None


@dataclass(frozen=True)
class RunPart:
    """A run and what is drawn of it; a picture is None where there is nothing to draw."""

    run: Run
    kinds: list[KindError]
    errors: Picture | None
    bytes: Picture | None
    seconds: Picture | None


def write_page(
    folder: Path,
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    worst: Mapping[str, WorstTokens],
    *,
    force: bool = False,
) -> list[Path]:
    """report.html and its pictures as .png in `folder`, and their paths, the page first.

    worst: by "<run>/<artifact's path>".

    Raises OutputError where one of them exists already and `force` is not given.
    """
    charts = [
        _picture(
            _numbered("divergence", index, len(comparisons)),
            f"KL divergence against bits per weight of {len(each.files)} files of {each.model}. Bars are one standard "
            "error; files on the dashed frontier are beaten by no other in both. The table has the numbers.",
            partial(figures.divergence, each),
        )
        for index, each in enumerate(comparisons)
    ]
    parts = [_part(run, index, len(runs)) for index, run in enumerate(runs)]
    pictures = charts + [
        picture for part in parts for picture in (part.errors, part.bytes, part.seconds) if picture is not None
    ]
    page = folder / PAGE
    results = [page, *(folder / f"{picture.name}.png" for picture in pictures)]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"num": number, "setting": setting}
    html = environment.get_template("report.html.jinja").render(
        parts=parts, comparisons=list(zip(comparisons, charts, strict=True)), worst=worst
    )
    with workspace(folder, results, force) as scratch:
        for picture in pictures:
            (scratch / f"{picture.name}.png").write_bytes(picture.png)
        (scratch / PAGE).write_text(html, encoding="utf-8")
        for path in reversed(results):  # the page last
            (scratch / path.name).replace(path)
    return results


def number(value: float | None, spec: str = "") -> Markup:
    """`value` rounded by `spec`, with itself beside it; a dash for None."""
    if value is None:
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(repr(value), format(value, spec))


def setting(value: Any) -> Markup:
    """A value of a report's own: numbers as such, lists and objects by their parts."""
    if isinstance(value, bool) or value is None:
        return Markup({True: "yes", False: "no", None: "–"}[value])
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, dict):
        return Markup(", ").join(Markup("{} = {}").format(printable(str(k)), setting(v)) for k, v in value.items())
    if isinstance(value, list):
        return Markup(", ").join(map(setting, value))
    return escape(printable(str(value)))


def kind_errors(layers: Sequence[LayerReport]) -> list[KindError]:
    """What `layers` come to by kind and artifact, where an error is known."""
    grouped: dict[str, dict[str, list[LayerReport]]] = {}
    for layer in layers:
        if layer.error is not None:
            grouped.setdefault(kind_of(layer.tensor), {}).setdefault(layer.artifact, []).append(layer)
    found = []
    for kind, artifact, group in ((kind, *each) for kind, groups in grouped.items() for each in groups.items()):
        errors = [layer.error for layer in group if layer.error is not None]
        mismatches = [layer.recoverable_mismatch for layer in group if layer.recoverable_mismatch is not None]
        types = list(dict.fromkeys(layer.format for layer in group))
        worst = group[errors.index(max(errors))].tensor
        mismatch = mean(mismatches) if mismatches else None
        found.append(KindError(artifact, kind, types, len(group), mean(errors), max(errors), worst, mismatch))
    return found


def _part(run: Run, index: int, count: int) -> RunPart:
    report = run.report
    named = partial(_numbered, index=index, count=count)
    kinds = kind_errors(report.layers)
    phases = {name: value for name, value in report.seconds.items() if name != "total" and value > 0}
    if (rest := report.seconds.get("total", 0.0) - sum(phases.values())) > 0:
        phases["anything else"] = rest
    return RunPart(
        run,
        kinds,
        _picture(
            named("errors"),
            "Error of each block's tensors relative to the layer's output (lines), and the recoverable mismatch "
            "(dotted), a panel for each kind of tensor; what is exactly 0 is left out. The table has the means, "
            "and below it are all tensors.",
            partial(figures.layer_errors, run),
        )
        if any(figures.in_a_panel(layer) for layer in report.layers)
        else None,
        _picture(
            named("bytes"),
            "Megabytes of each file by kind of tensor. The table has them by type, too.",
            partial(figures.stored_bytes, run),
        )
        if run.stored
        else None,
        _picture(
            named("seconds"),
            "Seconds of the run by phase. The table has the numbers.",
            partial(figures.seconds, phases),
        )
        if phases
        else None,
    )


def _picture(name: str, caption: str, draw: Callable[[], Figure]) -> Picture:
    return Picture(name, caption, *figures.render(draw))


def _numbered(name: str, index: int, count: int) -> str:
    return name if count == 1 else f"{name}-{index + 1}"
