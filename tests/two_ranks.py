"""Programs for two processes that gloo connects, as torchrun starts them: `python -m tests.two_ranks PROGRAM …`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from formats import FORMATS
from qronos_export import streams
from qronos_export.cli import main
from qronos_export.layers import _in_shards
from qronos_export.ranks import Ranks, joined
from qronos_export.report import LayerReport
from qronos_export.rounding import ROUNDERS, Coupled, Rounded, Settings
from qronos_export.statistics import LayerStats

FEATURES, TOKENS, HELD, ROWS = 256, 600, 120, 45
WIDE = 512


def statistics(x: torch.Tensor, x_hat: torch.Tensor, held: int) -> LayerStats:
    stats = LayerStats(FEATURES, written=ROWS)
    gap = x[:, :ROWS] - 0.9 * x_hat[:, :ROWS]
    stats.update(x[held:], x_hat[held:], gap[held:])
    stats.update(x[:held], x_hat[:held], gap[:held], held=True)
    return stats


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mix = torch.randn(FEATURES, FEATURES) / FEATURES**0.5
    x = torch.randn(TOKENS, FEATURES) @ mix
    return x, x + torch.randn(TOKENS, FEATURES) / 10


def check_combined(ranks: Ranks) -> None:
    """Shares of unequal size; all tokens held out at one process; an expert that one process has never seen."""
    x, x_hat = inputs()
    cut = 200
    share, held = ((slice(0, cut), HELD), (slice(cut, None), 0))[ranks.rank]
    mine, unseen = statistics(x[share], x_hat[share], held), statistics(x[:0], x_hat[:0], 0)
    if ranks.rank:
        unseen = statistics(x[:5], x_hat[:5], 0)
    nobodys = LayerStats(FEATURES)
    ranks.combine([mine, unseen, nobodys])
    for found, wanted in (
        (mine, statistics(x, x_hat, HELD)),
        (mine.held, statistics(x[:HELD], x_hat[:HELD], 0)),
        (unseen, statistics(x[:5], x_hat[:5], 0)),
    ):
        assert found is not None and found.tokens == wanted.tokens
        for ours, theirs in zip(found.settle(), wanted.settle(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert nobodys.tokens == 0 and nobodys.held is None


def check_merged(ranks: Ranks) -> None:
    whole = torch.arange(15.0).view(5, 3)
    rows = torch.tensor([[4, 1], [3, 0]])[ranks.rank]
    if ranks.rank:
        rows = torch.cat([rows, torch.tensor([2])])
    assert torch.equal(ranks.merge(whole[rows], rows, 5), whole)


def check_shards(ranks: Ranks) -> None:
    """Rows do not depend on each other, but for those of a head, which stay together: equal to the last bit."""
    stats = statistics(*inputs(), 0)
    weight = torch.randn(ROWS, FEATURES)
    heads = [torch.arange(3, 11), torch.tensor([30, 12, 44, 20])]
    coupled = [Coupled(rows, torch.eye(len(rows)) + torch.full((len(rows),) * 2, 0.5)) for rows in heads]
    for format, method, alike in (
        ("Q4_0", "qronos", coupled), ("Q4_K", "qronos", []), ("Q4_0", "gptq", coupled), ("Q8_0", "gptaq", []),
        ("Q4_0", "gpfq", []), ("Q4_K", "rtn", []),
    ):  # fmt: skip
        settings = replace(Settings(0.03, 1.0, "blocks", ridge=0.1), coupled=alike)
        rows: list[int] = []

        def rounder(part: torch.Tensor, *given: Any, method: str = method, rows: list[int] = rows) -> Rounded:
            rows.append(len(part))
            return ROUNDERS[method](part, *given)

        given = weight, stats, FORMATS[format], settings, rounder
        ours, alone = _in_shards(*given, ranks), _in_shards(*given, Ranks())
        assert len(rows) == 2 and rows[0] < rows[1] == ROWS
        assert torch.equal(ours.weight.blocks, alone.weight.blocks), (format, method)
        torch.testing.assert_close(ours.loss, alone.loss, rtol=1e-4, atol=0)
        assert (ours.mismatch is None) == (alone.mismatch is None)
        assert ours.weight.shape == alone.weight.shape and ours.method == alone.method


def checks() -> None:
    with joined() as ranks:
        assert (ranks.world, ranks.here, ranks.local) == (2, 2, ranks.rank)
        check_combined(ranks)
        check_merged(ranks)
        check_shards(ranks)
        check_codes(ranks)


def check_codes(ranks: Ranks) -> None:
    """A layer of a real size, from inputs to codes, beside one process that takes the same micro-batches: at most one
    code in 500 another (none was seen), and none that makes the layer worse."""
    torch.manual_seed(1)
    mix = torch.randn(WIDE, WIDE) / WIDE**0.5
    x = torch.randn(8 * WIDE, WIDE) @ mix
    x_hat, weight = x + torch.randn_like(x) / 10, torch.randn(WIDE, WIDE)
    whole, mine = LayerStats(WIDE), LayerStats(WIDE)
    for stats, each in ((whole, Ranks()), (mine, ranks)):
        for part in zip(each.share(x, WIDE), each.share(x_hat, WIDE), strict=True):
            stats.update(*part)
    ranks.combine([mine])
    assert whole.tokens == mine.tokens == len(x)
    for format in ("Q4_0", "Q4_K", "Q8_0"):
        settings = Settings(0.03, 1.0, "blocks", ridge=0.5)
        given = FORMATS[format], settings, ROUNDERS["qronos"]
        ours, alone = (_in_shards(weight, *each) for each in ((mine, *given, ranks), (whole, *given, Ranks())))
        codes, wanted = (FORMATS[format].unpack(each.weight.blocks)[0] for each in (ours, alone))
        assert (codes != wanted).float().mean() <= 0.002, format
        errors = [(x @ weight.T - x_hat @ each.weight.dequantize().T).square().sum() for each in (ours, alone)]
        assert errors[0] <= errors[1] * (1 + 1e-4), format


def failing(how: str) -> None:
    """The command line, whose second process fails in the middle of a block."""
    round_groups, calls = streams.round_groups, count()

    def failing_group(*given: Any, **more: Any) -> Iterator[LayerReport]:
        if os.environ["RANK"] == "1" and next(calls) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return round_groups(*given, **more)

    streams.round_groups = failing_group
    main()


if __name__ == "__main__":
    program = sys.argv.pop(1)
    checks() if program == "checks" else failing(program)
