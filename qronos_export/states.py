"""Where hidden states wait between decoder blocks: where they are computed, in the CPU's memory, or in files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shelf:
    """offload: none, cpu, or disk: files in `folder`, which whoever made that removes.
    dtype:   what numbers are kept in; None leaves them as they are."""

    offload: str = "none"
    dtype: torch.dtype | None = None
    folder: Path | None = None


ON_THE_SPOT = Shelf()


class States:
    """Hidden states of the same sequences in several streams, float [sequences, length, hidden] each. What is read is
    what was put there, rounded to the shelf's type, on the device and in the type it had."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._kept: list[_InMemory | _InFile] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, stream: int) -> Tensor:
        return self._kept[stream].read()

    def __setitem__(self, stream: int, x: Tensor) -> None:
        self._kept[stream].write(x)

    def __iter__(self) -> Iterator[Tensor]:
        """One at a time: each is read when its turn comes."""
        return (each.read() for each in self._kept)

    def append(self, x: Tensor) -> None:
        self._kept.append(_InFile(self._shelf) if self._shelf.offload == "disk" else _InMemory(self._shelf))
        self._kept[-1].write(x)


class _InMemory:
    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def write(self, x: Tensor) -> None:
        self._like = x.new_empty(0)
        kept = x.to(self._shelf.dtype or x.dtype)
        if self._shelf.offload == "cpu" and kept.device.type == "cuda":  # copies both ways queue on the GPU alone
            kept = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True).copy_(kept, non_blocking=True)
        self._kept = kept

    def read(self) -> Tensor:
        return self._kept.to(self._like.device, non_blocking=True).to(self._like.dtype)


class _InFile:
    """A file that is written anew each time, and read into new memory: pages of a mapped one would count as ours."""

    def __init__(self, shelf: Shelf) -> None:
        handle, path = tempfile.mkstemp(prefix="states-", dir=shelf.folder)
        os.close(handle)
        self._path, self._shelf = Path(path), shelf
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def write(self, x: Tensor) -> None:
        self._like, self._shape = x.new_empty(0), x.shape
        kept = x.to(self._shelf.dtype or x.dtype).cpu().contiguous()
        self._dtype = kept.dtype
        with self._path.open("wb") as file:
            file.write(kept.view(torch.uint8).numpy().data)

    def read(self) -> Tensor:
        pinned = self._like.device.type == "cuda"
        kept = torch.empty(self._shape, dtype=self._dtype, pin_memory=pinned)
        with self._path.open("rb", buffering=0) as file:
            into = memoryview(kept.view(torch.uint8).numpy().reshape(-1).data)
            while into and (count := file.readinto(into)):
                into = into[count:]
        if into:
            raise OSError(f"{self._path} is shorter than the hidden states that were written there")
        return kept.to(self._like.device, non_blocking=True).to(self._like.dtype)
