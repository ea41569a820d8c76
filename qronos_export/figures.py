"""The report's pictures, drawn by matplotlib without a display. Figures in, bytes of SVG or PNG out.

Text from models and files is drawn as it is: never as mathematics, and as outlines, so that a picture needs no font.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from qronos_export.report import LayerReport
from qronos_export.runs import Comparison, Measured, Run, block_of, kind_of, layer_kinds, printable

WIDTH = 7.2  # inches
_MARKERS = "osDv^<>P*X"
_NAME = 28  # letters of a name in a picture


@dataclass(frozen=True)
class Ink:
    """Colours on paper. `series` is Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind people tell
    apart, without the tones that this paper swallows."""

    paper: str
    text: str
    faint: str
    series: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.paper, self.text, self.faint, *self.series)


LIGHT = Ink("#ffffff", "#1b1f24", "#c9ced6", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"))
DARK = Ink("#16191d", "#e4e7eb", "#434a54", ("#56b4e9", "#e69f00", "#2fc79a", "#cc79a7", "#f0e442", "#d55e00"))
INK = LIGHT
"""Pictures are drawn in this, and recoloured."""


def render(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """The picture as SVG and as PNG; the same input gives the same bytes."""
    style: Any = {
        "svg.hashsalt": "qronos-export", "text.parse_math": False, "text.usetex": False, "font.size": 10,
        "font.family": "DejaVu Sans", "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "figure.facecolor": INK.paper, "axes.facecolor": INK.paper, "savefig.facecolor": INK.paper,
        "text.color": INK.text, "axes.labelcolor": INK.text, "xtick.color": INK.text, "ytick.color": INK.text,
        "axes.edgecolor": INK.faint, "grid.color": INK.faint, "grid.linewidth": 0.5, "legend.frameon": False,
    }  # fmt: skip
    svg, png = BytesIO(), BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # In a picture a box stands for what its font lacks; the tables have the text.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure = draw()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what was laid out stays; doing so again takes half of the time
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", metadata={"Software": None}, dpi=160)
    return svg.getvalue(), png.getvalue()


def dark(svg: bytes) -> bytes:
    """A picture of `render` for dark paper."""
    colours = dict(zip(LIGHT.all, DARK.all, strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: colours.get(found[0], found[0]), svg.decode()).encode()


def divergence(comparison: Comparison) -> Figure:
    """KL divergence against bits per weight, with error bars and the frontier."""
    figure, (axes,) = _figure(4.4)
    runs = list(dict.fromkeys(file.run for file in comparison.files))
    logarithmic = all(file.validation.kl_divergence > 0 for file in comparison.files)
    best = comparison.frontier
    if len(best) > 1:
        axes.plot(
            [file.bits for file in best], [file.validation.kl_divergence for file in best], color=INK.text,
            linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label="frontier",
        )  # fmt: skip
    for run, (colour, marker) in zip(runs, _styles(), strict=False):
        files = [file for file in comparison.files if file.run == run]
        axes.errorbar(
            [file.bits for file in files], [file.validation.kl_divergence for file in files],
            yerr=[file.validation.kl_divergence_error for file in files], fmt=marker, color=colour, capsize=3,
            elinewidth=1.2, markersize=6, label="baselines" if run is None else _short(run), zorder=3,
        )  # fmt: skip
    if logarithmic:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if len({math.floor(math.log10(file.validation.kl_divergence)) for file in comparison.files}) < 3:
            axes.yaxis.set_minor_formatter(_labelled((2, 5)))
    axes.margins(x=0.14, y=0.14)
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL divergence from the float model, nats")
    axes.grid(True, which="major")
    if len(runs) > 1 or len(best) > 1:
        axes.legend(loc="upper right")
    _put_labels(figure, axes, comparison.files)
    return figure


def in_a_panel(layer: LayerReport) -> bool:
    """Whether `layer_errors` shows it."""
    return block_of(layer.tensor) is not None and layer.error is not None


def layer_errors(run: Run) -> Figure:
    """A panel for each kind of tensor: relative error (line) and recoverable mismatch (dots) over the blocks."""
    layers = [layer for layer in run.report.layers if in_a_panel(layer)]
    kinds = layer_kinds(layers)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, panels = _figure(0.6 + 1.75 * rows, rows, columns)
    formats = list(dict.fromkeys(layer.artifact for layer in layers))
    handles = []
    drawn: dict[str, list[float]] = {kind: [] for kind in kinds}
    for fmt, (colour, marker) in zip(formats, _styles(), strict=False):
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, label=_short(fmt)))
        for kind, axes in zip(kinds, panels, strict=False):
            mine = [each for each in layers if each.artifact == fmt and kind_of(each.tensor) == kind]
            errors, mismatches = _by_block(mine, "error"), _by_block(mine, "recoverable_mismatch")
            axes.plot(*errors, color=colour, marker=marker, markersize=3, linewidth=1.1)
            axes.plot(*mismatches, color=colour, linestyle=":", linewidth=1.3)
            drawn[kind] += errors[1] + mismatches[1]
    if any(layer.recoverable_mismatch is not None for layer in layers):
        handles.append(Line2D([], [], color=INK.text, linestyle=":", label="recoverable mismatch"))
    for kind, axes in zip(kinds, panels, strict=False):
        axes.set_title(_short(kind), loc="left")
        if positive := [value for value in drawn[kind] if value > 0]:  # the first block's streams do not differ: 0
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if max(positive) < 30 * min(positive):
                axes.yaxis.set_minor_formatter(_labelled((2, 5)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(kinds) - columns) : len(kinds)]:
        axes.set_xlabel("block")
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))
    return figure


def stored_bytes(run: Run) -> Figure:
    """Of each file, how many megabytes go to which kind of tensor."""
    files = {
        run.label(artifact): run.stored[artifact.path]
        for artifact in run.report.artifacts
        if artifact.path in run.stored
    }
    kinds: dict[str, int] = {}
    for parts in files.values():
        for part in parts:
            kinds[part.kind] = kinds.get(part.kind, 0) + part.bytes
    named = sorted(kinds, key=lambda kind: -kinds[kind])[:9]
    if len(named) < len(kinds):
        named.append("others")
    figure, (axes,) = _figure(1.5 + 0.42 * len(files))
    left = [0.0] * len(files)
    hatches = ["", "", "", "", "", "", "//", "//", "//", "//", "//", "//"]
    for kind, (colour, _), hatch in zip(named, _styles(), hatches, strict=False):
        sizes = [
            sum(part.bytes for part in parts if (part.kind if part.kind in named else "others") == kind) / 1e6
            for parts in files.values()
        ]
        axes.barh(
            range(len(files)), sizes, left=left, color=colour, height=0.66, label=_short(kind), hatch=hatch,
            edgecolor=INK.paper, linewidth=0.6,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(files)), [_short(name) for name in files])
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8.5)
    return figure


def seconds(phases: dict[str, float]) -> Figure:
    """How long each phase took."""
    figure, (axes,) = _figure(0.8 + 0.32 * len(phases))
    bars = axes.barh(range(len(phases)), list(phases.values()), color=INK.series[0], height=0.66)
    axes.bar_label(bars, [f"{value:.1f} s" for value in phases.values()], padding=4)
    axes.set_yticks(range(len(phases)), [_short(name) for name in phases])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    return figure


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _styles() -> Iterable[tuple[str, str]]:
    """Colour and marker of each series; the two repeat at different lengths."""
    return zip(cycle(INK.series), cycle(_MARKERS), strict=False)


def _short(name: str) -> str:
    plain = printable(" ".join(name.split()))
    return plain if len(plain) <= _NAME else plain[: _NAME - 1] + "…"


def _by_block(layers: Sequence[LayerReport], quantity: str) -> tuple[list[int], list[float]]:
    """The mean of `quantity` in each block, where it is known: several weights can be one kind, such as experts."""
    values: dict[int, list[float]] = {}
    for layer in layers:
        block, value = block_of(layer.tensor), getattr(layer, quantity)
        if block is not None and value is not None:
            values.setdefault(block, []).append(value)
    blocks = sorted(values)
    return blocks, [mean(values[block]) for block in blocks]


def _labelled(digits: tuple[int, ...]) -> Callable[[float, Any], str]:
    """A formatter for a logarithmic axis' minor ticks: those whose first digit is one of `digits`."""

    def text(value: float, _: Any) -> str:
        digit = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0
        return f"{value:g}" if round(digit) in digits else ""

    return text


_PLACES = tuple(
    (across * far, up * far, side)
    for far in (1, 2.2, 3.6)
    for across, up, side in (
        (9, 0, "left"), (-9, 0, "right"), (7, 9, "left"), (-7, -9, "right"), (7, -9, "left"), (-7, 9, "right"),
        (0, 12, "center"), (0, -12, "center"),
    )
)  # fmt: skip
"""Where a label may stand: points right of and above what it names, and its end that is there."""


def _put_labels(figure: Figure, axes: Axes, files: Sequence[Measured]) -> None:
    """A label beside each point, where it covers the fewest others and points; with a line to it where it is far."""
    figure.draw_without_rendering()  # lays the axes out
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    points = [axes.transData.transform((file.bits, file.validation.kl_divergence)) for file in files]
    inside = axes.get_window_extent(renderer)
    taken: list[Any] = []
    for file in files:
        tried: list[tuple[int, int, Any, Any]] = []
        for place, (across, up, side) in enumerate(_PLACES):
            label = axes.annotate(
                _short(file.label), (file.bits, file.validation.kl_divergence), (across, up), fontsize=8.5,
                textcoords="offset points", ha=side, va="center", annotation_clip=False, zorder=4,
                arrowprops={"arrowstyle": "-", "color": INK.faint, "shrinkA": 0, "shrinkB": 3} if place > 7 else None,
            )  # fmt: skip
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its line
            outside = box.x0 < inside.x0 or box.y0 < inside.y0 or box.x1 > figure.bbox.x1 or box.y1 > inside.y1
            covered = sum(map(box.overlaps, taken)) + sum(box.contains(*at) for at in points) + 9 * outside
            tried.append((covered, place, label, box))
            if not covered:
                break
        *_, best, box = min(tried, key=lambda each: each[:2])
        taken.append(box)
        for *_, label, _ in tried:
            if label is not best:
                label.remove()
