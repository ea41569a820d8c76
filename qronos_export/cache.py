"""Where this package keeps what can be made again: built tools, downloads, resumable work. Nothing else
decides that."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$QRONOS_EXPORT_CACHE`, else `$XDG_CACHE_HOME/qronos-export`, else `~/.cache/qronos-export`.

    It need not exist yet.
    """
    if chosen := os.environ.get("QRONOS_EXPORT_CACHE"):
        return Path(chosen).absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches).absolute() if caches else Path.home() / ".cache") / "qronos-export"
