"""Compiles `kernels.cpp` with the machine's C++ compiler, once, and loads it.

The library lies in the cache under the hash of what it was made from. Without a compiler torch computes the same; `how`
says which of them does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")  # products are rounded as torch rounds them
_VECTORS = {"AVX512": ("-mavx512f",), "AVX2": ("-mavx2", "-mfma")}  # by what torch finds the CPU capable of
_LIMIT = 120.0  # seconds; it takes three


def folder() -> Path:
    """`compiled` below the cache folder of qronos_export, found by the same rules; it need not exist yet."""
    if chosen := os.environ.get("QRONOS_EXPORT_CACHE"):
        return Path(chosen).absolute() / "compiled"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches).absolute() if caches else Path.home() / ".cache") / "qronos-export" / "compiled"


def how() -> str:
    """What searches scales and hands errors on, on this machine's CPU: `compiled for AVX512`, say, or `torch: ` and why
    nothing is compiled.

    Compiles if that was not done before, with $CXX or c++.
    """
    return _loaded()[1]


def library() -> ctypes.CDLL | None:
    """The functions of `kernels.cpp`, compiled if that was not done before; None where it cannot be done."""
    return _loaded()[0]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    compiler, capability = os.environ.get("CXX") or "c++", torch.backends.cpu.get_cpu_capability()
    command = [*shlex.split(compiler), *_FLAGS, *_VECTORS.get(capability, ())]
    made_from = "\n".join([*command, _SOURCE.read_text(encoding="utf-8")])
    path = folder() / f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _compile(command, path)
        return ctypes.CDLL(str(path)), f"compiled for {capability}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"torch: {shlex.join(command)} made nothing to load in {path.parent}: {_reason(error)}"


def _compile(command: list[str], path: Path) -> None:
    """Written aside and renamed: whoever else compiles it finds a whole library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [*command, "-o", str(made), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LIMIT)
        made.replace(path)


def _reason(error: Exception) -> str:
    printed = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return (printed or str(error)).strip().partition("\n")[0]
