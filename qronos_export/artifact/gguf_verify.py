"""A written GGUF file read back, by our own code and by gguf-py's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from formats import BlockFormat
from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import CHUNK, GGUFFile
from qronos_export.artifact.gguf_rows import row_hashes
from qronos_export.errors import ArtifactError

UNKNOWN_UPSTREAM = frozenset({"Q1_0", "Q2_0"})
"""Types that gguf-py has no dequantize for."""


def verify_gguf(path: Path, source: GGUFFile, store: BlockStore) -> GGUFFile:
    """Reopen a written file and compare every tensor: calibrated values = our dequantize = gguf-py's dequantize of the
    file's bytes, and untouched tensors equal the float file's. Raises ArtifactError naming the first difference.

    Types that gguf-py cannot dequantize (Q1_0, Q2_0) are compared without it.
    """
    written = GGUFFile(path)
    if list(written.tensors) != [*source.tensors, *store.scales]:
        raise ArtifactError(f"{path} does not hold the tensors of {source.path}.")
    for name, scales in store.scales.items():
        if not np.array_equal(written.bytes(name).view(np.float32)[0], scales):
            raise ArtifactError(f"{path}: {name} is not what was calibrated.")
    for name in source.tensors:
        tensor, data = written.tensors[name], written.bytes(name)
        if name not in store.formats:
            if not np.array_equal(data, source.bytes(name)):
                raise ArtifactError(f"{path}: {name} changed though it was not quantized.")
            continue
        fmt, expected = store.formats[name], store.calibrated(name)
        step = max(1, CHUNK // tensor.columns)
        for first in range(0, tensor.rows, step):
            part = data[first : first + step]
            ours = fmt.dequantize(torch.from_numpy(part))
            if not torch.equal(row_hashes(ours), expected[first : first + step]):
                raise ArtifactError(f"{path}: {name} is not what was calibrated.")
            theirs = _upstream(part, fmt)
            if theirs is not None and not np.array_equal(ours.numpy(), theirs):
                raise ArtifactError(f"{path}: gguf reads {name} ({fmt.name}) differently than it was calibrated.")
    return written


def _upstream(data: np.ndarray, fmt: BlockFormat) -> np.ndarray | None:
    """gguf-py's dequantize, which wants F32 and F16 as such and everything else as bytes; None for types it lacks."""
    if fmt.name in UNKNOWN_UPSTREAM:
        return None
    typed = data.view({"F32": np.float32, "F16": np.float16}.get(fmt.name, np.uint8))
    return gguf.quants.dequantize(typed, gguf.GGMLQuantizationType[fmt.name])
