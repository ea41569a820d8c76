"""Finished blocks on their way to an artifact: on disk, so that only one tensor's are in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats import BlockFormat
from qronos_export.artifact.gguf import CHUNK, StoredTensor
from qronos_export.artifact.gguf_rows import row_hashes
from qronos_export.errors import ArtifactError


class BlockStore:
    """Finished blocks on disk, one file a tensor, with a hash of every row's values as the quantized stream used it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.formats: dict[str, BlockFormat] = {}
        self._scales: dict[str, Tensor] = {}
        self._calibrated: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def put(
        self, tensor: StoredTensor, fmt: BlockFormat, file_rows: Tensor, blocks: Tensor, values: Tensor, scales: Tensor
    ) -> None:
        """Store `blocks` uint8 [n, row_bytes] at `file_rows` [n]. In the calibrated model they stand for `values`
        float32 [n, columns], times `scales` [n], which are the same for all rows of a tensor or of an expert in it."""
        name = tensor.name
        fresh = name not in self.formats
        if fresh:
            self.formats[name] = fmt
            self._calibrated[name] = torch.zeros(tensor.rows, dtype=torch.int64)
            self._missing[name] = tensor.rows
            self._scales[name] = torch.full((tensor.experts,), torch.nan)
        self._set_scales(name, tensor.expert(file_rows), scales.cpu())
        shape = tensor.rows, fmt.row_bytes(tensor.columns)
        if fresh:
            _reserve(self.path(name), shape[0] * shape[1])
        data = np.memmap(self.path(name), dtype=np.uint8, mode="r+", shape=shape)
        data[file_rows.numpy()] = blocks.cpu().numpy()
        self._calibrated[name][file_rows] = row_hashes(values).cpu()
        self._missing[name] -= len(file_rows)

    def values(self, tensor: StoredTensor, file_rows: Tensor) -> Tensor:
        """What rows [n] of a finished tensor stand for in the calibrated model: float32 [n, columns]."""
        fmt, path = self.formats[tensor.name], self.finished(tensor.name)
        shape = tensor.rows, fmt.row_bytes(tensor.columns)
        rows = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)[file_rows.numpy()]
        values = fmt.dequantize(torch.from_numpy(rows))
        return values * self._scales[tensor.name][tensor.expert(file_rows)][:, None]

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a finished tensor: uint8 [rows, row_bytes]."""
        return np.fromfile(self.finished(name), dtype=np.uint8).reshape(len(self._calibrated[name]), -1)

    def finished(self, name: str) -> Path:
        """The file with all blocks of a tensor. Raises ArtifactError where some are missing."""
        if self._missing[name]:
            raise ArtifactError(f"{self._missing[name]} rows of {name} were never rounded.")
        return self.path(name)

    def take(self, tensor: StoredTensor, fmt: BlockFormat, scales: Tensor, calibrated: Tensor) -> None:
        """A tensor whose file an earlier process finished, with what `scale` and `calibrated` said there."""
        self.formats[tensor.name] = fmt
        self._scales[tensor.name] = scales
        self._calibrated[tensor.name] = calibrated
        self._missing[tensor.name] = 0

    def calibrated(self, name: str) -> Tensor:
        """Hash of each row's values in the calibrated model, in file order: int64 [rows]."""
        return self._calibrated[name]

    def scale(self, name: str) -> Tensor:
        """What the blocks' values are multiplied by in the calibrated model: float32 [experts]."""
        return self._scales[name]

    def _set_scales(self, name: str, expert: Tensor, scales: Tensor) -> None:
        known = self._scales[name][expert]
        if not bool(((known == scales) | known.isnan()).all()):
            raise ArtifactError(f"rows of one matrix of {name} were given different scales.")
        self._scales[name][expert] = scales

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """Scales that tensors need beside their blocks, by the name llama.cpp looks for: float32 [experts]."""
        return {
            f"{name.removesuffix('.weight')}.scale": scales.numpy()
            for name, scales in self._scales.items()
            if bool((scales != 1).any())
        }

    def discard(self) -> None:
        """Delete the blocks; the artifact holds them now."""
        shutil.rmtree(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.blocks"


def _reserve(path: Path, size: int) -> None:
    """A file of `size` bytes whose space is taken: a full disk is an OSError here, in a mapped file it kills."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, CHUNK):
                file.write(bytes(min(CHUNK, size - start)))
