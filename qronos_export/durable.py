"""Files that are on the disk when the call returns: records with a checksum of themselves, and raw numbers.

What does not fit on a full disk is an OSError of the call that wrote it, never a file that is short.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qronos_export.errors import OutputError
from qronos_export.report import sha256


def write_record(path: Path, body: dict[str, Any]) -> None:
    """A record and its checksum; on the disk when this returns, and there as a whole or not at all."""
    text = json.dumps(body, ensure_ascii=False)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where it is absent or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(record["body"].encode()).hexdigest() != record["sha256"]:
            return None
        body: dict[str, Any] = json.loads(record["body"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return body


def write_raw(path: Path, tensors: Iterable[Tensor]) -> str:
    """The numbers of `tensors`, one after another; on the disk when this returns. Returns their sha256."""
    digest = hashlib.sha256()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for tensor in tensors:
            data = tensor.contiguous().cpu().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest.hexdigest()


def read_raw(file: BinaryIO, like: Tensor) -> Tensor:
    """The next numbers of a file of `write_raw`, a tensor as `like` is one. Raises OutputError where they end early."""
    tensor = torch.empty(like.shape, dtype=like.dtype)
    if file.readinto(tensor.view(torch.uint8).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise OutputError(f"{file.name} is shorter than what was written there; delete its folder.")
    return tensor.to(like.device)


def whole(path: Path, wanted: str) -> bool:
    """Whether a file is there and has the sha256 `wanted`."""
    return path.is_file() and sha256(path) == wanted


def contents(path: Path) -> str:
    """Sha256 of a file, or of the names and sha256 of all files in a folder."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "\n".join(f"{sha256(file)} {file.relative_to(path)}" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file, or which files a folder has, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(path: Path) -> None:
    """The same of a file, or of a folder and all that is in it."""
    for part in (*path.rglob("*"), path):
        sync(part)
