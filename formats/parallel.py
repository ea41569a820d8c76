"""Parts of a large tensor at once, one core each. Torch's own threads gain little on parts that fit into a cache, and
between operations they wait busily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Part = TypeVar("Part")
Found = TypeVar("Found")


def side_by_side(function: Callable[[Part], Found], parts: Iterable[Part], device: torch.device) -> list[Found]:
    """`function` of every part, in order; on a CPU on as many threads as torch may use, in which torch has one; a
    single part is left to torch's own. No gradients are recorded; results are those of one part after another, on one
    thread."""
    parts = list(parts)
    threads = torch.get_num_threads() if device.type == "cpu" else 1  # 1 in these threads themselves
    inference = torch.is_inference_mode_enabled()  # which a new thread would not know

    def alone(part: Part) -> Found:
        with torch.inference_mode(inference), torch.no_grad():
            return function(part)

    if threads == 1 or len(parts) < 2:
        return [alone(part) for part in parts]
    try:
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(threads)  # a thread's own setting is also that of threads to come


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """For operations on tensors too small to share: torch's threads would wait for them busily, on cores others may
    need."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def at_once(device: torch.device) -> int:
    """How many weights to take at a time: on a CPU so few that temporaries stay in the cache, else little beside
    large tables."""
    return 1 << 18 if device.type == "cpu" else 1 << 22
