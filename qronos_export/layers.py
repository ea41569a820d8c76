"""Rounds one group of weights: gathers rows per format, calls the rounder once for each, stores the blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from formats import FORMATS, BlockFormat, nvfp4_tensor_scale
from qronos_export.calibration import Group, Matrix
from qronos_export.plan import Mix, Plan
from qronos_export.report import LayerReport
from qronos_export.rounding import Rounder, Settings, rtn

if TYPE_CHECKING:
    from qronos_export.artifact.gguf import BlockStore, StoredTensor, Target
    from qronos_export.statistics import LayerStats

# A Hessian of fewer tokens than this share of its width says little; such experts are rounded to nearest.
MIN_TOKENS_PER_FEATURE = 1 / 16


def round_group(
    group: Group, plan: Plan, mix: Mix, rounder: Rounder, settings: Settings, store: BlockStore
) -> Iterator[LayerReport]:
    """Round every weight of `group` that has a target in `mix`; rows of one format are swept together.

    Afterwards `matrix.quantized` holds the stored values, and `store` the blocks.
    """
    by_format: dict[str, list[tuple[Matrix, Target]]] = {}
    for matrix in group.matrices:
        for target in plan.targets(matrix.name):
            if fmt := mix.format(target.tensor):
                by_format.setdefault(fmt.name, []).append((matrix, target))
    for name, jobs in by_format.items():
        yield from _round_rows(jobs, plan, mix, FORMATS[name], group.stats, rounder, settings, store)


def _fallback(stats: LayerStats, rounder: Rounder) -> tuple[Rounder, str]:
    if rounder is rtn or stats.tokens >= max(1, stats.features * MIN_TOKENS_PER_FEATURE):
        return rounder, ""
    return rtn, f"saw only {stats.tokens} tokens for {stats.features} inputs; rounded to nearest"


def _round_rows(
    jobs: list[tuple[Matrix, Target]],
    plan: Plan,
    mix: Mix,
    fmt: BlockFormat,
    stats: LayerStats,
    rounder: Rounder,
    settings: Settings,
    store: BlockStore,
) -> Iterator[LayerReport]:
    started = time.perf_counter()
    device = jobs[0][0].weight.device
    parts = [matrix.weight[target.rows.to(device)].to(torch.float32) for matrix, target in jobs]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    scales = torch.cat([_tensor_scales(plan.tensor(target), target, matrix.weight, fmt) for matrix, target in jobs])
    scales = scales.to(device)[:, None]
    weight = weight / scales
    rounder, note = _fallback(stats, rtn if fmt.is_float else rounder)
    rounded = rounder(weight, stats, fmt, settings)
    power = torch.linalg.vecdot(weight @ stats.hessian if stats.tokens else weight, weight)
    values = rounded.weight.dequantize()
    seconds = (time.perf_counter() - started) / len(weight)  # per row

    start = 0
    for matrix, target in jobs:
        rows = slice(start, start := start + len(target.rows))
        blocks = rounded.weight.blocks[rows]
        store.put(plan.tensor(target), fmt, target.file_rows, blocks, values[rows], scales[rows, 0])
        matrix.quantized[target.rows.to(device)] = (values[rows] * scales[rows]).to(matrix.quantized.dtype)
        yield LayerReport(
            artifact=mix.name,
            name=matrix.name,
            tensor=target.tensor,
            format=fmt.name,
            method=rounded.method,
            error=_share(rounded.loss, power, rows),
            recoverable_mismatch=_share(rounded.mismatch, power, rows),
            damping=rounded.damping if rounded.damping else None,
            tokens=stats.tokens,
            seconds=seconds * len(target.rows),
            note="; ".join(filter(None, [note, rounded.note])),
        )


def _tensor_scales(tensor: StoredTensor, target: Target, weight: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """What llama.cpp multiplies the outputs of each row by: float32 [rows of `target`], one value a tensor or expert.

    Only NVFP4 has such scales, and only in the blocks; powers of two, so that dividing by them is exact.
    """
    scales = torch.ones(len(target.rows))
    if fmt.name == "NVFP4" and tensor.name.startswith("blk."):
        expert = tensor.expert(target.file_rows)
        for each in expert.unique():
            mine = expert == each
            scales[mine] = nvfp4_tensor_scale(weight[target.rows[mine].to(weight.device)].to(torch.float32))
    return scales


def _share(part: torch.Tensor | None, whole: torch.Tensor, rows: slice) -> float | None:
    """Σ part / Σ whole over `rows`; None where either is unknown, nothing or beyond every float."""
    if part is None:
        return None
    share = float(part[rows].sum() / whole[rows].sum())
    return share if math.isfinite(share) else None
