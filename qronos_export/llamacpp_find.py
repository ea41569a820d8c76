"""Where llama.cpp's tools are on this machine."""

import os
import re
import shutil
from pathlib import Path

from qronos_export.cache import cache_folder
from qronos_export.errors import LlamaCppError
from qronos_export.llamacpp import CONVERTER, INSTALLED, PINNED, TOOLS, VARIABLE, LlamaCpp
from qronos_export.llamacpp_log import version
from qronos_export.process import run


def find(explicit: Path | None = None) -> LlamaCpp:
    """The llama.cpp to use: the folder given, else `$QRONOS_EXPORT_LLAMACPP`, else PATH, else our own installed one.

    A folder may hold the tools, or be a checkout with build/bin, or an install with bin. A place that was named and is
    wrong is an error, not a reason to look further.
    """
    if explicit is not None:
        return open_folder(explicit, "the folder given")
    if named := os.environ.get(VARIABLE):
        return open_folder(Path(named), VARIABLE)
    if all(shutil.which(tool) for tool in TOOLS):
        return open_folder(Path(str(shutil.which(TOOLS[0]))).parent, "PATH")
    if installed_folder().is_dir():
        return open_folder(installed_folder(), INSTALLED)
    raise LlamaCppError(
        "llama.cpp was not found. Looked for its tools in: the folder given (none was), "
        f"{VARIABLE} (not set), PATH (lacks {', '.join(tool for tool in TOOLS if not shutil.which(tool))}), "
        f"and {installed_folder()} (does not exist).\n"
        f"Run `qronos-export llamacpp install` to build {PINNED}, or set {VARIABLE} to the folder of a build."
    )


def open_folder(folder: Path, origin: str) -> LlamaCpp:
    """The tools in `folder`; `origin` says in messages and reports why it is this one."""
    if not folder.is_dir():
        raise LlamaCppError(f"{folder} ({origin}) is not a folder; expected one with llama.cpp's tools in it.")
    folder = folder.absolute()
    places = [folder, folder / "bin", folder / "build" / "bin"]
    bin_folder = next((place for place in places if (place / TOOLS[0]).is_file()), None)
    if bin_folder is None:
        raise LlamaCppError(
            f"{folder} ({origin}) has no {TOOLS[0]}, nor has its bin/ or build/bin/. "
            f"Expected a folder of built llama.cpp tools: {', '.join(TOOLS)}."
        )
    if missing := [tool for tool in TOOLS if not (bin_folder / tool).is_file()]:
        raise LlamaCppError(f"{bin_folder} ({origin}) lacks {', '.join(missing)}. Build these targets there too.")
    said = run([bin_folder / TOOLS[0], "--version"], time_limit=60)
    return LlamaCpp(bin_folder, _source_of(bin_folder), version(said), origin)


def installed_folder() -> Path:
    """Where llamacpp_build.install puts the pinned build: bin/ and source/."""
    return cache_folder() / f"llamacpp-{PINNED}"


def _source_of(bin_folder: Path) -> Path | None:
    """The source the tools were built from where that can be told, else the pinned one where it is installed."""
    build = bin_folder.resolve().parent
    places = [build / "source", build.parent]
    settings = build / "CMakeCache.txt"
    if settings.is_file() and (home := re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.+)$", settings.read_text(), re.M)):
        places.insert(0, Path(home[1]))
    places.append(installed_folder() / "source")
    return next((place for place in places if (place / CONVERTER).is_file() and (place / "gguf-py").is_dir()), None)
