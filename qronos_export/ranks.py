"""The processes of one run, as torchrun starts them: each takes a share of the calibration sequences through the model,
statistics are summed over all, rows of a matrix are rounded in shards, and rank 0 writes.

Tensors on a GPU travel by nccl, others by gloo. Whoever fails ends; the others hear of it where they wait for each
other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qronos_export.device import pick_device
from qronos_export.errors import RankError, UsageError
from qronos_export.memory import ran_out
from qronos_export.statistics import LayerStats

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`, and of the `here` on this machine number `local`. What all do at once
    raises RankError where another is gone."""

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check_device(self, name: str) -> None:
        """Raises UsageError where processes of this machine would have to share a GPU, which nccl refuses."""
        if self.here == 1:
            return
        if name.startswith("cuda:"):
            raise UsageError(
                f"--device {name} is one GPU for {self.here} processes; leave it out, then each takes the GPU of its "
                "local rank. Which GPUs there are, CUDA_VISIBLE_DEVICES can say."
            )
        gpus = torch.cuda.device_count()
        if _any_gpu(name) and self.here > gpus:
            raise UsageError(
                f"{self.here} processes on this machine need as many GPUs, and torch finds {gpus}; start torchrun with "
                f"--nproc-per-node {gpus}, or give --device cpu."
            )

    def device(self, name: str) -> torch.device:
        """`pick_device`; of several GPUs this process's own, made torch's current one before anything else is."""
        if self.world == 1 or not _any_gpu(name):
            return pick_device(name)
        self.check_device(name)
        torch.cuda.set_device(self.local)  # else pinned memory and "cuda" are of the first GPU in every process
        return pick_device(f"cuda:{self.local}")

    def share(self, tokens: Tensor, micro_batch: int) -> tuple[Tensor, ...]:
        """The micro-batches, of `tokens` [sequences, length], that this process runs: those of a process alone, dealt
        out in turn; smaller ones where these are fewer than processes."""
        return tokens.split(max(1, min(micro_batch, len(tokens) // self.world)))[self.rank :: self.world]

    def owners(self, count: int, together: Sequence[Tensor]) -> Tensor:
        """Which process rounds each of `count` rows: int64 [count]. Those of each of `together` go to one."""
        owner = torch.full((count,), -1)
        for number, rows in enumerate(together):
            owner[rows.cpu()] = number % self.world
        rest = (owner < 0).nonzero()[:, 0]
        owner[rest] = torch.arange(len(rest)) * self.world // max(1, len(rest))
        return owner

    def merge(self, part: Tensor, rows: Tensor, count: int) -> Tensor:
        """What all processes found for their `rows`, `part` [rows, …], in the order of the rows: [count, …]."""
        whole = part.new_zeros(count, *part.shape[1:])
        whole[rows.to(part.device)] = part
        _all_reduce(whole)
        return whole

    def combine(self, stats: Sequence[LayerStats]) -> None:
        """Make each of `stats` that of the tokens of all processes."""
        if self.world == 1:
            return
        totals = torch.tensor([[each.tokens, each.held.tokens if each.held else 0] for each in stats])
        _all_reduce(totals)
        for each, (total, held) in zip(stats, totals.tolist(), strict=True):
            if held:
                each.held = each.held or each.empty()
                self._sum(each.held, held)
            if total:
                self._sum(each, total)

    def _sum(self, stats: LayerStats, total: int) -> None:
        for moment in stats.sums:
            _all_reduce(moment)
        stats.tokens = total

    def sum(self, *found: Tensor) -> None:
        """Make each of `found` the sum of all processes'."""
        if self.world > 1:
            for each in found:
                _all_reduce(each)

    def largest(self, found: Tensor) -> None:
        """Make `found` the largest of all processes', number by number."""
        if self.world > 1:
            _all_reduce(found, dist.ReduceOp.MAX)

    def joined(self, part: Tensor) -> Tensor:
        """The parts of all processes, along the first dimension."""
        if self.world == 1:
            return part
        return torch.cat(self._gathered(part.cpu())).to(part.device)

    def values(self, function: Callable[[Item], float], items: Sequence[Item]) -> list[float]:
        """`function` of every item; each process does some."""
        if self.world == 1:
            return [function(item) for item in items]
        found = torch.zeros(len(items), dtype=torch.float64)
        for number in range(self.rank, len(items), self.world):
            found[number] = function(items[number])
        _all_reduce(found)
        return found.tolist()

    def texts(self, text: str) -> list[str]:
        """What each process says, every text once."""
        return list(dict.fromkeys(self._gathered(text)))

    def agree(self, text: str) -> bool:
        """Whether all processes say the same."""
        return self.world == 1 or len(self.texts(text)) == 1

    def send(self, work: object) -> None:
        """From rank 0 to all others, which `receive` it."""
        if self.world > 1:
            with _together():
                dist.broadcast_object_list([work])

    def receive(self) -> Any:
        box: list[Any] = [None]
        with _together():
            dist.broadcast_object_list(box)
        return box[0]

    def _gathered(self, own: object) -> list[Any]:
        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, own)
        return found


def _any_gpu(name: str) -> bool:
    """Whether --device leaves it open which GPU."""
    return name == "cuda" or (name == "auto" and torch.cuda.is_available())


def _all_reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
    with _together():
        dist.all_reduce(tensor, how)


@contextmanager
def _together() -> Iterator[None]:
    """Around what all processes do at once. Its errors are RuntimeErrors of many kinds."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        what = [*str(error).splitlines(), type(error).__name__][0]
        raise RankError(f"Another process of this run failed or is gone ({what}); see what it says itself.") from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started; without torchrun, alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # others wait while the first converts a large model
    try:
        local, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), dist.get_world_size(), local, here)
    finally:
        dist.destroy_process_group()
