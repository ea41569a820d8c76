"""KL divergence against bits per weight, a point with its error for each file. Needs matplotlib, the extra `report`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from qronos_export.comparison import Compared
from qronos_export.errors import OutputError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises UsageError where `draw` could not write to `path`, before anything is measured for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run `pip install 'qronos-export[report]'`.")
    if path.suffix not in SUFFIXES or not path.parent.is_dir():
        raise UsageError(f"--plot {path}: expected a name that ends in {', '.join(SUFFIXES)}, in a folder that exists.")


def draw(files: Sequence[Compared], path: Path) -> None:
    """Whole or not at all. Raises OutputError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="bits per weight", ylabel="KL divergence from the float model, nats", title=_measured_on(files)
    )
    for each in files:
        v = each.validation
        axes.errorbar(each.bits_per_weight, v.kl_divergence, yerr=v.kl_divergence_error, fmt="o", capsize=3)
        # Dollar signs would begin mathematics.
        axes.annotate(
            each.file.replace("$", r"\$"),
            (each.bits_per_weight, v.kl_divergence),
            textcoords="offset points",
            xytext=(6, 6),
        )
    axes.margins(x=0.15, y=0.15)
    if all(each.validation.kl_divergence > each.validation.kl_divergence_error for each in files):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _measured_on(files: Sequence[Compared]) -> str:
    first = files[0].validation
    return f"{first.chunks} chunks of {first.context} tokens"
