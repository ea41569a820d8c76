"""Rounds groups of weights: gathers rows per format, calls the rounder once for each, stores the blocks."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from formats import BlockFormat
from formats.parallel import side_by_side
from qronos_export.attention import Attention
from qronos_export.calibration import Group, Matrix
from qronos_export.plan import Mix
from qronos_export.precision import product
from qronos_export.ranks import ALONE, Ranks
from qronos_export.report import LayerReport
from qronos_export.rounding import CORRECTING, Coupled, Rounded, Rounder, Settings, blind, chosen, magr, rtn

if TYPE_CHECKING:
    from qronos_export.artifact.gguf import StoredTensor, Target
    from qronos_export.statistics import LayerStats


class Destinations(Protocol):
    """Where rows of weights go; a `Plan`, or what stands for one."""

    def claim(self, weights: Mapping[str, torch.Tensor]) -> None: ...

    def targets(self, name: str) -> list[Target]: ...

    def forget(self) -> None: ...

    def tensor(self, target: Target) -> StoredTensor: ...

    def may_have_scale(self, tensor: str) -> bool: ...


class Store(Protocol):
    """Where finished blocks go."""

    def put(
        self,
        tensor: StoredTensor,
        fmt: BlockFormat,
        file_rows: torch.Tensor,
        blocks: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
    ) -> None: ...


_ROOM = 4 << 30  # bytes that what is rounded side by side may take for its factors
_FACTORS = 4 * torch.float64.itemsize  # of these, for an entry of H
# A Hessian of fewer tokens than this share of its width says little; such experts are rounded to nearest.
MIN_TOKENS_PER_FEATURE = 1 / 16


@dataclass(frozen=True)
class _Rows:
    """Rows of one group that become one format, below each other in the order of `jobs`."""

    fmt: BlockFormat
    jobs: list[tuple[Matrix, Target]]
    stats: LayerStats


@dataclass(frozen=True)
class _Finished:
    """What became of some rows, `values` in units of `scales` [rows, 1]. `seconds` are for a row."""

    rows: _Rows
    rounded: Rounded
    values: torch.Tensor
    scales: torch.Tensor
    power: torch.Tensor
    settings: Settings
    note: str
    seconds: float


def round_groups(
    groups: Sequence[Group],
    plan: Destinations,
    mix: Mix,
    rounder: Rounder,
    settings: Settings,
    store: Store,
    attention: Attention | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[LayerReport]:
    """Round every weight of `groups` that has a target in `mix`; rows of a group that become one format are swept
    together, but for those that make a head of `attention`. Each of `ranks` sweeps some of the rows.

    Groups of a stop do not read one another; experts go side by side, as many as `together` says.

    Afterwards `matrix.quantized` holds the stored values, and `store` the blocks.
    """
    parts = [part for group in groups for part in _by_format(group, plan, mix)]
    device = groups[0].matrices[0].weight.device
    count = together(len(groups), groups[0].stats.features, device) if ranks.world == 1 else 1
    for first in range(0, len(parts), count):
        finished = side_by_side(
            lambda rows: _rounded(rows, plan, rounder, settings, attention, ranks), parts[first : first + count], device
        )
        for each in finished:
            yield from _stored(each, plan, mix, store, attention)


def together(groups: int, features: int, device: torch.device) -> int:
    """How many of so many groups with inputs of `features` are rounded side by side, each on one thread: as many as
    torch has threads, if there are that many, and if their factors find room; else one after another on all threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, min(threads, _ROOM // (_FACTORS * features**2))) if 1 < threads <= groups else 1


def _by_format(group: Group, plan: Destinations, mix: Mix) -> Iterator[_Rows]:
    found: dict[str, _Rows] = {}
    for matrix in group.matrices:
        for target in plan.targets(matrix.name):
            if fmt := mix.format(target.tensor, matrix.weight.shape[1]):
                found.setdefault(fmt.name, _Rows(fmt, [], group.stats)).jobs.append((matrix, target))
    yield from found.values()


def _fallback(stats: LayerStats, rounder: Rounder) -> tuple[Rounder, str]:
    if rounder in (rtn, blind) or stats.tokens >= max(1, stats.features * MIN_TOKENS_PER_FEATURE):
        return rounder, ""
    return rtn, f"saw only {stats.tokens} tokens for {stats.features} inputs; rounded to nearest"


def _rounded(
    rows: _Rows, plan: Destinations, rounder: Rounder, settings: Settings, attention: Attention | None, ranks: Ranks
) -> _Finished:
    jobs, fmt, stats = rows.jobs, rows.fmt, rows.stats
    started = time.perf_counter()
    device = jobs[0][0].weight.device
    parts = [matrix.weight[target.rows.to(device)].to(torch.float32) for matrix, target in jobs]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    scales, unscaled = _tensor_scales(weight, jobs, plan, fmt)
    weight = weight / scales
    stats = stats.of_rows(torch.cat([target.rows for _, target in jobs]), None if bool((scales == 1).all()) else scales)
    rounder, note = _fallback(stats, rtn if fmt.is_float else rounder)
    moved = ""
    if settings.magr and stats.tokens and not note and not fmt.is_float:
        under_one_scale = fmt.fit(weight[:1, : fmt.block_size]).group
        given, weight = weight, magr(weight, stats.hessian, settings.magr, under_one_scale)
        change = weight - given
        share = torch.linalg.vecdot(change @ stats.hessian, change).sum()
        share = share / torch.linalg.vecdot(given @ stats.hessian, given).sum()
        moved = f"MagR moved the outputs by {float(share):.2g} of their power"
    if settings.dither is not None:  # other draws for every group of layers
        settings = replace(settings, dither=zlib.crc32(f"{settings.dither} {fmt.name} {jobs[0][0].name}".encode()))
    if settings.held_out and rounder is not rtn:
        settings = chosen(weight, stats, fmt, settings, rounder)
    if attention and rounder is not rtn:
        settings = replace(settings, coupled=_coupled(jobs, attention, stats))
    if stats.borrowed and not note and rounder is not blind:
        own = stats.tokens - stats.borrowed
        note = f"saw only {own} tokens for {stats.features} inputs; {stats.borrowed} of other experts make up for that"
    note = "; ".join(filter(None, [note, unscaled, moved]))
    rounded = _in_shards(weight, stats, fmt, settings, rounder, ranks)
    power = torch.linalg.vecdot(product(weight, stats.hessian) if stats.tokens else weight, weight)
    values = rounded.weight.dequantize()
    seconds = (time.perf_counter() - started) / len(weight)
    return _Finished(rows, rounded, values, scales, power, settings, note, seconds)


def _stored(
    done: _Finished, plan: Destinations, mix: Mix, store: Store, attention: Attention | None
) -> Iterator[LayerReport]:
    rounded, fmt, stats, settings, start = done.rounded, done.rows.fmt, done.rows.stats, done.settings, 0
    for matrix, target in done.rows.jobs:
        rows = slice(start, start := start + len(target.rows))
        blocks, values, scales = rounded.weight.blocks[rows], done.values[rows], done.scales[rows]
        store.put(plan.tensor(target), fmt, target.file_rows, blocks, values, scales[:, 0])
        matrix.quantized[target.rows.to(values.device)] = (values * scales).to(matrix.quantized.dtype)
        yield LayerReport(
            artifact=mix.name,
            name=matrix.name,
            tensor=target.tensor,
            format=fmt.name,
            method=rounded.method,
            error=_share(rounded.loss, done.power, rows),
            recoverable_mismatch=_share(rounded.mismatch, done.power, rows),
            damping=rounded.damping if rounded.damping else None,
            shrinkage=settings.shrinkage if rounded.method in CORRECTING else None,
            ridge=settings.ridge if rounded.method == "qronos" else None,
            tokens=stats.tokens - stats.borrowed,
            seconds=done.seconds * len(target.rows),
            note="; ".join(
                filter(None, [done.note, rounded.note, attention.note_of(matrix.name) if attention else ""])
            ),
            residual=rounded.method == "qronos" and stats.written > 0,
        )


def _in_shards(
    weight: torch.Tensor, stats: LayerStats, fmt: BlockFormat, settings: Settings, rounder: Rounder, ranks: Ranks
) -> Rounded:
    """`rounder` of all rows, of which each of `ranks` does some; a head's stay together. Where there are too few, and
    codes that are drawn for a whole matrix, each does all."""
    if ranks.world == 1 or settings.dither is not None:
        return rounder(weight, stats, fmt, settings)
    owners = ranks.owners(len(weight), [each.rows for each in settings.coupled])
    if len(owners.unique()) < ranks.world:
        return rounder(weight, stats, fmt, settings)
    rows = (owners == ranks.rank).nonzero()[:, 0].to(weight.device)
    place = torch.full((len(weight),), -1, device=weight.device)
    place[rows] = torch.arange(len(rows), device=weight.device)
    mine = [replace(each, rows=place[each.rows]) for each in settings.coupled if int(place[each.rows[0]]) >= 0]
    part = rounder(weight[rows], stats.of_rows(rows), fmt, replace(settings, coupled=mine))
    if len(ranks.texts(part.method)) > 1:  # some rows went astray
        return rounder(weight, stats, fmt, settings)

    def merged(found: torch.Tensor) -> torch.Tensor:
        return ranks.merge(found, rows, len(weight))

    return replace(
        part,
        weight=replace(part.weight, blocks=merged(part.weight.blocks), shape=(len(weight), weight.shape[1])),
        loss=merged(part.loss),
        mismatch=None if part.mismatch is None else merged(part.mismatch),
        note="; ".join(filter(None, ranks.texts(part.note))),
    )


def _coupled(jobs: list[tuple[Matrix, Target]], attention: Attention, stats: LayerStats) -> list[Coupled]:
    """The heads of `attention` by the rows that `jobs` put below each other: of a head, those rows that are there."""
    found, start = [], 0
    for matrix, target in jobs:
        place = torch.full((len(matrix.weight),), -1, device=stats.hessian.device)
        place[target.rows] = torch.arange(start, start := start + len(target.rows), device=place.device)
        for head in attention.coupled(matrix.name, stats):
            here = place[head.rows] >= 0
            if bool(here.any()):
                found.append(Coupled(place[head.rows][here], head.hessian[here][:, here]))
    return found


def _tensor_scales(
    weight: torch.Tensor, jobs: list[tuple[Matrix, Target]], plan: Destinations, fmt: BlockFormat
) -> tuple[torch.Tensor, str]:
    """What llama.cpp multiplies the outputs of each row of `weight` [rows, columns] by: float32 [rows, 1], one value a
    tensor or expert, and a note where it would not multiply though the format asks for it."""
    tensors = list(dict.fromkeys(target.tensor for _, target in jobs))
    owner = torch.cat([torch.full((len(target.rows),), tensors.index(target.tensor)) for _, target in jobs])
    expert = torch.cat([plan.tensor(target).expert(target.file_rows) for _, target in jobs])
    scales, note = torch.ones(len(weight), 1), ""
    for number, each in torch.stack([owner, expert], dim=1).unique(dim=0).tolist():
        mine = (owner == number) & (expert == each)
        wanted = fmt.tensor_scale(weight[mine.to(weight.device)])
        if wanted != 1 and plan.may_have_scale(tensors[number]):
            scales[mine] = wanted
        elif wanted != 1:
            note = f"its weights would be better off divided by {wanted:g}, but llama.cpp has no scale for it here"
    return scales.to(weight.device), note


def _share(part: torch.Tensor | None, whole: torch.Tensor, rows: slice) -> float | None:
    """Σ part / Σ whole over `rows`; None where either is unknown, nothing or beyond every float."""
    if part is None:
        return None
    share = float(part[rows].sum() / whole[rows].sum())
    return share if math.isfinite(share) else None
