"""Two processes of torchrun, over gloo: the file of one process, but for the order in which sums are made."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.errors import UsageError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.preconditions import check_ranks
from qronos_export.ranks import Ranks
from qronos_export.recipe import Recipe
from tests.families import make


def quantize(model: Path, output: Path, text: Path, llamacpp: LlamaCpp, ranks: int, *options: str) -> dict[str, Any]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [
        sys.executable, *start, "-m", "qronos_export", "quantize", str(model), "--output", str(output), "--calibration",
        str(text), "--samples", "9", "--sequence-length", "64", "--no-validate", "--llamacpp", str(llamacpp.bin_folder),
        *options,
    ]  # fmt: skip
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on threads as well
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alike)
    if done.returncode:
        raise ChildProcessError(done.stderr)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def pair(*arguments: str) -> list[tuple[int, str]]:
    """Exit code and printed errors of two processes of `tests.two_ranks`; without torchrun, which ends the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_ranks", *arguments],
            cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"},
        )
        for rank in "01"
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def test_sums_and_shards_are_those_of_one_process() -> None:
    """What each process has of the tokens, merged rows, and codes of shards on equal statistics, which are equal."""
    for code, printed in pair("checks"):
        assert code == 0, printed


@pytest.mark.parametrize("how", ["memory", "killed"])
def test_who_fails_says_why_and_the_other_that_it_is_gone(
    how: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    model = make("llama", tmp_path / "tiny")
    (first, said), (second, why) = pair(
        how, "quantize", str(model), "--output", str(tmp_path / "out"), "--calibration", str(english), "--samples", "4",
        "--sequence-length", "32", "--transforms", "none", "--no-validate", "--llamacpp", str(llamacpp.bin_folder),
    )  # fmt: skip
    assert (first, second) == (1, 1 if how == "memory" else -signal.SIGKILL), said + why
    assert "error: Another process of this run failed or is gone (" in said and "Traceback" not in said + why
    if how == "memory":
        assert "error: Memory ran out in the stage 'layers' (DefaultCPUAllocator: can't allocate memory). Try" in why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "gpus", "says"),
    [
        ("cuda:1", 2, "--device cuda:1 is one GPU for 2 processes; leave it out"),
        ("cuda", 1, "2 processes on this machine need as many GPUs, and torch finds 1; start torchrun with"),
        ("auto", 1, "2 processes on this machine need as many GPUs, and torch finds 1; start torchrun with"),
        ("auto", 2, ""),
        ("cpu", 1, ""),
    ],
)
def test_each_process_has_a_gpu_of_its_own(name: str, gpus: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is torch's current one before anything is made on a GPU, or the run is refused before anything is done."""
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr("qronos_export.ranks.pick_device", lambda name: done.append(name) or torch.device(name))
    ranks = Ranks(1, 2, local=1, here=2)
    if says:
        with pytest.raises(UsageError, match=says):
            check_ranks(Recipe("model", device=name), ranks)
        assert not done
        return
    check_ranks(Recipe("model", device=name), ranks)
    device = ranks.device(name)
    assert (str(device), done) == (("cpu", ["cpu"]) if name == "cpu" else ("cuda:1", [1, "cuda:1"]))


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "Q4_0,Q8_0", "--transforms", "none"),
        ("--format", "Q4_0", "--transforms", "none", "--set", "held_out=0.25", "--set", "micro_batch=1"),
        ("--format", "Q4_K", "--transforms", "equalize"),
        ("--format", "Q4_0", "--transforms", "none", "--offload", "disk"),
    ],
)
def test_two_processes_write_what_one_does(
    options: tuple[str, ...], llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """Where both take micro-batches that one would take: to the last bit, but that torch sums over few rows in another
    order than over many, which a code in thousands may show, and then what follows it."""
    model = make("llama", tmp_path / "tiny")
    options = ("--set", "micro_batch=2", *options)
    one, two = (quantize(model, tmp_path / str(ranks), english, llamacpp, ranks, *options) for ranks in (1, 2))
    assert one["recipe"] == two["recipe"] and one["calibration"] == two["calibration"]
    for artifact in one["artifacts"]:
        ours, other = (GGUFFile(tmp_path / ranks / artifact["path"]) for ranks in "12")
        assert list(ours.tensors) == list(other.tensors)
        first = [name for name in ours.tensors if name.startswith(("blk.0.attn", "token_embd"))]
        assert len(first) > 4
        for name in first:
            assert (ours.bytes(name) == other.bytes(name)).mean() >= 0.998, name
    assert_alike(one, two, 0.01, 0.1)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_two_processes_with_other_micro_batches(family: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """Sums of other batches differ in their last bits. A code that tips moves all that follow, to an error as small."""
    model = make(family, tmp_path / "tiny")
    options = ("--format", "Q4_0", "--transforms", "none")
    one, two = (quantize(model, tmp_path / str(ranks), english, llamacpp, ranks, *options) for ranks in (1, 2))
    ours, other = (GGUFFile(tmp_path / ranks / one["artifacts"][0]["path"]) for ranks in "12")
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        assert (ours.bytes(name) == other.bytes(name)).mean() > 0.9, name
    assert_alike(one, two, 0.05, 0.5)


def assert_alike(one: dict[str, Any], two: dict[str, Any], mean: float, most: float) -> None:
    """The same layers from the same tokens, and errors whose ratios have logarithms within these bounds."""
    drift = []
    for a, b in zip(one["layers"], two["layers"], strict=True):
        for what in ("artifact", "name", "tensor", "format"):
            assert a[what] == b[what]
        if "experts" not in a["name"]:  # which tokens are routed to may change by one
            assert a["tokens"] == b["tokens"]
        if a["error"]:
            drift.append(np.log(b["error"] / a["error"]))
    assert drift and abs(np.mean(drift)) < mean and np.abs(drift).max() < most


def test_both_hear_of_a_transform_that_does_not_fit(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """Nobody waits for a process that has given up."""
    model, options = make("gemma3", tmp_path / "tiny"), ("--format", "Q4_0", "--pure")
    with pytest.raises(ChildProcessError, match="hadamard does not fit"):
        quantize(model, tmp_path / "out", english, llamacpp, 2, *options, "--transforms", "equalize,hadamard")
    assert not (tmp_path / "out").exists()


def test_too_little_for_two_is_refused(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "tiny")
    with pytest.raises(ChildProcessError) as refused:
        quantize(model, tmp_path / "out", english, llamacpp, 2, "--method", "rtn")
    assert "rtn has no sequences to share; run it without torchrun" in " ".join(str(refused.value).split())
    assert not (tmp_path / "out").exists()
    recipe = Recipe(str(model), samples=3)
    check_ranks(recipe, Ranks(0, 3))
    for few in (recipe, replace(recipe, samples=12, held_out=0.25)):
        check_ranks(few, Ranks())
        with pytest.raises(UsageError, match=f"{few.samples} samples are too few for 4 processes"):
            check_ranks(few, Ranks(0, 4))


def test_every_row_has_one_owner_and_heads_stay_whole() -> None:
    for world in (2, 3):
        heads = [torch.arange(n, n + 4) for n in range(2, 22, 4)]
        owners = Ranks(0, world).owners(30, heads)
        assert owners.unique().tolist() == list(range(world))
        assert all(len(owners[head].unique()) == 1 for head in heads)
        sizes = owners.bincount()
        assert int(sizes.max() - sizes.min()) <= 8
