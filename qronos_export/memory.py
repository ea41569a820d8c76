"""This process's memory: its peak, giving back what was freed, and telling that it did not suffice."""

from __future__ import annotations

import ctypes
import errno
import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes. Memory on a GPU is not in it."""
    status = Path("/proc/self/status")  # getrusage also counts what the process was before exec: a copy of its parent
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident set of this process now, in bytes; on systems that do not tell, its peak."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory()


def give_back() -> None:
    """Return freed memory to the system where the C library has a way to.

    glibc keeps what lies between live pieces of its heap; without this the resident set creeps up with every block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


_WORDS = (
    "out of memory",  # CUDA, NCCL
    "can't allocate memory",  # torch on a CPU
    "Cannot allocate memory",  # mmap
    "std::bad_alloc",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuSPARSE, cuDNN
    "could not create a memory",  # oneDNN
)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory did not suffice. torch has no type of its own for that on a CPU, and libraries
    for GPUs have their words for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return any(words in str(error) for words in _WORDS)
    return isinstance(error, MemoryError | torch.OutOfMemoryError)
