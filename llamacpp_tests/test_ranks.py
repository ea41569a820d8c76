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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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
    ("family", "options"),
    [
        ("qwen3_moe", ("--format", "Q4_0,Q8_0")),  # experts, and heads that are not torn apart
        ("llama", ("--format", "Q4_0", "--set", "held_out=0.25")),
    ],
)
def test_two_processes_write_what_one_does(
    family: str, options: tuple[str, ...], llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """What q, k and v of the first block become. Later a code that sums in another order round the other way moves all
    that follow, to an error as small; λ that tokens held out choose may then be another one."""
    model = make(family, tmp_path / "tiny")
    options = (*options, "--transforms", "none")
    one, two = (quantize(model, tmp_path / str(ranks), english, llamacpp, ranks, *options) for ranks in (1, 2))
    for artifact in one["artifacts"]:
        ours, other = (GGUFFile(tmp_path / ranks / artifact["path"]) for ranks in "12")
        assert list(ours.tensors) == list(other.tensors)
        assert np.array_equal(ours.bytes("token_embd.weight"), other.bytes("token_embd.weight"))
        for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
            alike = (ours.bytes(name) == other.bytes(name)).mean()
            assert alike > (0.9 if artifact["format"] == "Q4_0" else 0.5), name  # Q8_0: 0.82 was seen
    assert [layer["name"] for layer in one["layers"]] == [layer["name"] for layer in two["layers"]]
    pairs = [(a, b) for a, b in zip(one["layers"], two["layers"], strict=True) if a["error"]]
    for ours, other in pairs:
        if "experts" not in ours["name"]:  # which tokens are routed to may change by one
            assert ours["tokens"] == other["tokens"]
        if ours["name"].startswith("model.layers.0.self_attn") and "o_proj" not in ours["name"]:
            assert other["error"] == pytest.approx(ours["error"], rel=0.1)
            steps = 2 * np.log10(other["damping"] / ours["damping"])  # of mean(diag H), chosen from steps of 10^½
            assert steps == pytest.approx(round(steps), abs=1e-4)
    if family == "qwen3_moe":  # -0.003 and 0.075 were seen
        drift = [np.log(other["error"] / ours["error"]) for ours, other in pairs]
        assert abs(np.mean(drift)) < 0.05 and np.abs(drift).max() < 0.5


def test_two_processes_search_as_one_does(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """Among the same candidates, on inputs that each has some of: the columns of `equalize`, and what they lead to."""
    model = make("llama", tmp_path / "tiny")
    options = ("--format", "Q4_0", "--transforms", "equalize", "--method", "gptq")
    one, two = (quantize(model, tmp_path / str(ranks), english, llamacpp, ranks, *options) for ranks in (1, 2))
    assert one["recipe"]["transforms"] == two["recipe"]["transforms"] == "equalize"
    ours, other = (GGUFFile(tmp_path / ranks / one["artifacts"][0]["path"]) for ranks in "12")
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        gains = [np.concatenate([part.numpy() for part in file.floats(name)]) for file in (ours, other)]
        np.testing.assert_allclose(gains[0], gains[1], rtol=1e-3)
    assert not np.allclose(gains[0], 1, rtol=1e-2)
    assert (ours.bytes("blk.0.attn_q.weight") == other.bytes("blk.0.attn_q.weight")).mean() > 0.9


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
