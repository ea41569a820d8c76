"""Runs that are killed, stopped, starved and damaged end in the bytes of a run that was left alone.

Processes are forks of one that has imported the package, so that each costs a second less than `python -m` and calls
what that calls; SIGTERM is tried on `python -m qronos_export` itself.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qronos_export import pipeline, resume, workspace
from qronos_export.durable import read_record, write_record
from qronos_export.errors import CheckpointError, OutOfMemoryError, OutputError
from qronos_export.events import Finished, Resumed, Stage, Step
from qronos_export.llamacpp import LlamaCpp
from qronos_export.pipeline import run
from qronos_export.recipe import Recipe
from qronos_export.report import sha256
from qronos_export.resume import FOLDER
from tests.families import make

STEPS = 5  # embedding, three blocks, head
FORKS = """
import json, os, sys
import qronos_export.pipeline, transformers.models.llama.modeling_llama
from qronos_export.cli import main
for line in sys.stdin:
    if (child := os.fork()) == 0:
        request = json.loads(line)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["qronos-export", *request["arguments"]]
        try:
            main()
        except SystemExit as ended:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(ended.code or 0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Forks:
    """Runs command lines one at a time."""

    process: subprocess.Popen[str]
    log: Path

    def call(self, arguments: list[str], act: Callable[[int], None] = lambda pid: None) -> tuple[int, str]:
        """Exit code, or minus the signal, and what was printed; `act` is called with the process's id at the start."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"log": str(self.log), "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        act(int(self.process.stdout.readline()))
        return int(self.process.stdout.readline()), self.log.read_text()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which jobs in the background ignore
    )
    with process:
        yield Forks(process, tmp_path_factory.mktemp("log") / "log")
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the processes have: how many there are is part of what decides the bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, english: Path) -> Recipe:
    """Two formats, a transform, rows of heads coupled."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make("llama", folder / "tiny", num_hidden_layers=3, head_dim=16, **shape)
    text = folder / "text.txt"
    text.write_text(english.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return Recipe(
        str(model), format="Q4_0,Q8_0", transforms="equalize", attention_aware=True, calibration=str(text), samples=8,
        sequence_length=64, micro_batch=3, device="cpu",
    )  # fmt: skip


def arguments(recipe: Recipe, output: Path, *more: str) -> list[str]:
    file = output.parent / f"{output.name}.json"
    file.write_text(json.dumps(recipe.to_json()))
    return ["quantize", "--recipe", str(file), "--output", str(output), "--no-validate", *more]


def result(output: Path) -> dict[str, Any]:
    """All that a run leaves and that is no time."""
    report = json.loads((output / "report.json").read_text())
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in report["layers"]]
    rest = {key: value for key, value in report.items() if key not in ("seconds", "peak_memory_bytes", "layers")}
    files = {file.name: sha256(file) for file in output.glob("*.gguf")}
    assert sorted(file.name for file in output.iterdir()) == sorted([*files, "report.json"])
    return {"files": files, "layers": layers, **rest}


@dataclass
class Known:
    """What an undisturbed run leaves, what a run leaves that was killed seven times, in each phase once, and the state
    of that one after its third step."""

    result: dict[str, Any]
    killed: dict[str, Any]
    state: Path

    def copy(self, output: Path) -> Path:
        """`output` as that run left it; its state."""
        return Path(shutil.copytree(self.state, output / FOLDER))


def begin(recipe: Recipe, output: Path, llamacpp: LlamaCpp) -> Any:
    return run(recipe, output, llamacpp=llamacpp, held=None, resume=True)


def finish(recipe: Recipe, output: Path, llamacpp: LlamaCpp) -> tuple[int, list[str]]:
    """Resume to the end: how many steps were there, and what was damaged."""
    found = (0, [])
    for event in begin(recipe, output, llamacpp):
        if isinstance(event, Resumed):
            found = event.done, event.damaged
    assert isinstance(event, Finished)
    return found


def wait_for(path: Path, pid: int) -> None:
    while not path.exists():
        os.kill(pid, 0)  # raises once it is gone
        time.sleep(0.002)


@pytest.fixture(scope="module")
def known(forks: Forks, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("known")
    code, printed = forks.call(arguments(recipe, folder / "alone"))
    assert code == 0, printed
    output = folder / "killed"
    state = output / FOLDER
    dice = random.Random(0)
    third = f"step-{STEPS - 2:05}"
    for reached in ("manifest", "tokens", "float-transformed", "step-00001", third, "step-00004", f"step-{STEPS:05}"):

        def kill(pid: int, reached: str = reached) -> None:
            wait_for(state / f"{reached}.json", pid)
            time.sleep(dice.random() / 20)
            os.kill(pid, signal.SIGKILL)

        code, printed = forks.call(arguments(recipe, output, "--resume"), kill)
        assert code == -signal.SIGKILL, printed
        assert (output / "report.json").exists() <= (reached == f"step-{STEPS:05}")
        if reached == third:
            shutil.copytree(state, folder / "third")
            for step in (folder / "third").glob(f"step-{STEPS - 1:05}*"):  # it may have come to the next one
                step.unlink()
    code, printed = forks.call(arguments(recipe, output, "--resume"))
    assert code == 0 and f"resumed after {STEPS} steps" in printed, printed
    return Known(result(folder / "alone"), result(output), folder / "third")


def test_twenty_kills_change_no_byte(forks: Forks, recipe: Recipe, known: Known, tmp_path: Path) -> None:
    """After the seven of `known`, thirteen of runs that have begun: after a random number of changes in the state's
    folder, be it a file that appears or one that grows."""
    assert known.killed == known.result
    dice, kills = random.Random(1), 0
    while kills < 13:
        output = tmp_path / f"{kills}"
        state = known.copy(output)
        for part in (*state.glob("step-*"), *state.glob("blocks/*/*")):
            part.unlink()
        while True:
            changes = dice.randint(1, 40)

            def kill(pid: int, changes: int = changes, state: Path = state) -> None:
                before = sizes(state)
                with suppress(ProcessLookupError):  # it came to its end first
                    while changes:
                        os.kill(pid, 0)
                        now = sizes(state)
                        changes -= now != before
                        before = now
                    os.kill(pid, signal.SIGKILL)

            code, printed = forks.call(arguments(recipe, output, "--resume"), kill)
            if code == 0 or (code == 1 and "exists already" in printed):  # killed when all was done
                break
            assert code == -signal.SIGKILL, printed
            kills += 1
        assert result(output) == known.result


def sizes(folder: Path) -> list[tuple[str, int]]:
    found = []
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                found.append((f"{place}/{file}", (Path(place) / file).stat().st_size))
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r, f: replace(r, damping=0.5), "recipe.damping was 0.03, is 0.5"),
        (lambda r, f: replace(r, format="Q8_0,Q4_0"), 'recipe.format was "Q4_0,Q8_0", is "Q8_0,Q4_0"'),
        (lambda r, f: replace(r, calibration=str(_text(r, f))), "calibration text was "),
        (lambda r, f: replace(r, model=str(_model(r, f))), "model/model.safetensors was "),
        (lambda r, f: _edit(f, "version of torch", "0.1"), "version of torch was 0.1, is "),
        (lambda r, f: _edit(f, "code", "other"), "code was other, is "),
        (lambda r, f: _edit(f, "threads", "7"), "threads was 7, is 1"),
        (lambda r, f: (f / FOLDER / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    ],
    ids=["recipe", "format", "text", "model", "version", "code", "threads", "manifest"],
)
def test_another_run_is_refused(
    change: Callable[[Recipe, Path], Any],
    says: str,
    recipe: Recipe,
    known: Known,
    llamacpp: LlamaCpp,
    tmp_path: Path,
) -> None:
    state = known.copy(tmp_path / "out")
    changed = change(recipe, tmp_path / "out")
    wanted = changed if isinstance(changed, Recipe) else recipe
    before = sorted(state.rglob("*"))
    with pytest.raises(OutputError, match="begin anew: delete that folder or give --force") as refused:
        list(begin(wanted, tmp_path / "out", llamacpp))
    assert says in str(refused.value) and sorted(state.rglob("*")) == before


def _text(recipe: Recipe, output: Path) -> Path:
    file = output.parent / "text.txt"
    file.write_text(Path(recipe.calibration).read_text() + ".")
    return file


def _model(recipe: Recipe, output: Path) -> Path:
    folder = Path(shutil.copytree(recipe.model, output.parent / Path(recipe.model).name))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder


def _edit(output: Path, name: str, value: str) -> None:
    """As if the run had been begun with another `name`."""
    path = output / FOLDER / "manifest.json"
    body = read_record(path)
    assert body is not None and name in body
    write_record(path, {**body, name: value})


def test_the_same_run_elsewhere_goes_on(recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """Model and text count by what they hold, not by where they lie; nor does it matter where hidden states wait."""
    model = Path(shutil.copytree(recipe.model, tmp_path / Path(recipe.model).name))
    text = Path(shutil.copy(recipe.calibration, tmp_path / "other.txt"))
    known.copy(tmp_path / "out")
    again = replace(recipe, model=str(model), calibration=str(text), offload="disk")
    assert finish(again, tmp_path / "out", llamacpp) == (3, [])
    assert result(tmp_path / "out")["files"] == known.result["files"]


def test_force_begins_anew(recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    known.copy(tmp_path)
    events = run(replace(recipe, damping=0.5), tmp_path, llamacpp=llamacpp, held=None, resume=True, force=True)
    next(event for event in events if isinstance(event, Stage) and event.name not in ("load", "checksums"))
    assert not list((tmp_path / FOLDER).glob("step-*"))
    events.close()


def test_force_without_resume_ends_the_state(recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """Its files are replaced by those of a run that does not know it."""
    state = known.copy(tmp_path)
    for force in (False, True):
        events = run(recipe, tmp_path, llamacpp=llamacpp, held=None, force=force)
        next(event for event in events if isinstance(event, Stage) and event.name != "load")
        assert state.is_dir() is not force
        events.close()


def block_file(tensor: str) -> str:
    return f"{hashlib.sha256(tensor.encode()).hexdigest()[:24]}.blocks"


@pytest.mark.parametrize(
    ("pattern", "left", "named"),
    [
        ("step-00003.json", 2, "step-00003"),
        ("step-00003.hidden", 2, "step-00003"),
        ("step-00003.hashes", 2, "step-00003"),
        (f"blocks/Q4_0/{block_file('blk.1.attn_q.weight')}", 2, "step-00003"),
        (f"blocks/Q4_0/{block_file('blk.0.attn_q.weight')}", 3, "step-00002"),
        (f"blocks/Q8_0/{block_file('token_embd.weight')}", 3, "step-00001"),
        ("step-00002.hashes", 3, "step-00002"),
        ("step-0000[23].hashes", 2, "step-00002"),
        ("step-00001.json", 0, "step-00001"),
        ("tokens.json", 0, "tokens"),
        ("tokens/tokens", 3, "tokens"),
        ("float/*.gguf", 3, "float"),
    ],
)
def test_damage_is_found_and_made_again(
    pattern: str, left: int, named: str, recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path
) -> None:
    state = known.copy(tmp_path)
    for file in state.glob(pattern) if "[" in pattern else sorted(state.glob(pattern))[:1]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    done, damaged = finish(recipe, tmp_path, llamacpp)
    assert done == left and any(each.startswith(named) for each in damaged), (done, damaged)
    assert result(tmp_path) == known.result


def test_a_damaged_head_is_made_again_where_what_it_reads_is_damaged_too(
    recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path
) -> None:
    events, state = begin(recipe, tmp_path, llamacpp), tmp_path / FOLDER
    for _ in events:
        if (state / f"step-{STEPS:05}.json").exists():
            events.close()
    for file in (f"blocks/Q4_0/{block_file('output.weight')}", f"step-{STEPS - 1:05}.hidden"):
        (state / file).write_bytes((state / file).read_bytes()[:-1] + b"x")
    done, damaged = finish(recipe, tmp_path, llamacpp)
    assert done == STEPS and f"step-{STEPS:05}" in damaged
    assert result(tmp_path) == known.result


@pytest.mark.parametrize("kind", ["nearest", "offloaded", "experts"])
def test_other_runs_make_a_damaged_block_again(kind: str, recipe: Recipe, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """Rounding to nearest, which has no streams; forwards that run anew; experts, which lend each other tokens."""
    if kind == "nearest":
        recipe = replace(recipe, method="rtn", transforms="none", attention_aware=None)
    elif kind == "offloaded":
        recipe = replace(recipe, offload="disk")
    else:
        recipe = replace(recipe, model=str(make("mixtral", tmp_path / "tiny")), format="Q8_0", transforms="none")
    alone, output = tmp_path / "alone", tmp_path / "again"
    assert finish(recipe, alone, llamacpp) == (0, [])
    state = output / FOLDER
    events = begin(recipe, output, llamacpp)
    for _ in events:
        if (state / "step-00003.json").exists():
            events.close()
    record = read_record(state / "step-00002.json")
    assert record is not None
    blocks = record["blocks"]["Q8_0"]
    assert any("exps" in name for name in blocks) == (kind == "experts")
    file = state / "blocks" / "Q8_0" / block_file(list(blocks)[-1])
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    done, damaged = finish(recipe, output, llamacpp)
    assert done >= 3 and damaged == ["step-00002"]
    assert result(output) == result(alone)


def test_two_runs_do_not_share_a_state(recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    known.copy(tmp_path)
    first = begin(recipe, tmp_path, llamacpp)
    next(event for event in first if isinstance(event, Resumed))
    with pytest.raises(OutputError, match="Another run works in"):
        list(begin(recipe, tmp_path, llamacpp))
    *_, last = first
    assert isinstance(last, Finished) and result(tmp_path) == known.result


@pytest.mark.parametrize("ended", [True, False])
def test_a_state_that_comes_or_goes_before_it_is_locked(
    ended: bool, recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another run, which has begun or ended since this one looked."""
    state = tmp_path / FOLDER
    if ended:
        known.copy(tmp_path)

    def lock(folder: Path) -> int:
        if ended:
            shutil.rmtree(state)
            state.mkdir()
        else:
            write_record(state / "manifest.json", {})
        return workspace.lock(folder)

    monkeypatch.setattr(resume, "lock", lock)
    with pytest.raises(OutputError, match="has begun or ended"):
        list(begin(recipe, tmp_path, llamacpp))
    assert state.exists() is not ended


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_state_and_say_so(
    number: int, code: int, forks: Forks, recipe: Recipe, known: Known, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    state = known.copy(output)
    third = state / f"step-{STEPS - 2:05}.json"
    third.unlink()  # so that a block is left when it has been made again

    def stop(pid: int) -> None:
        wait_for(third, pid)
        os.kill(pid, number)

    line = arguments(recipe, output, "--resume")
    if number == signal.SIGTERM:
        command = [sys.executable, "-m", "qronos_export", *line]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as p:
            stop(p.pid)
            printed, _ = p.communicate()
            ended = p.returncode
    else:
        ended, printed = forks.call(line, stop)
    assert ended == code and "Traceback" not in printed, printed
    assert f"resume with: qronos-export quantize --recipe {output}.json --output {output}" in printed.replace("\n", " ")
    assert [path.name for path in output.iterdir()] == [FOLDER] and not list(state.glob(".qronos-export-*"))
    assert forks.call(line)[0] == 0
    assert result(output) == known.result


def test_an_interrupted_run_that_is_not_to_be_resumed_leaves_nothing(
    recipe: Recipe, llamacpp: LlamaCpp, tmp_path: Path
) -> None:
    quick = replace(recipe, transforms="none", method="rtn", attention_aware=None)
    events = run(quick, tmp_path / "out", llamacpp=llamacpp, held=None)
    next(event for event in events if isinstance(event, Step) and event.done)
    events.close()
    assert not (tmp_path / "out").exists()


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_full_disk_keeps_what_is_finished(recipe: Recipe, known: Known, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """No file may grow beyond half of the hidden states: to a process, a disk that is full in the middle of them."""
    state = known.copy(tmp_path)
    events = begin(recipe, tmp_path, llamacpp)
    next(event for event in events if isinstance(event, Stage) and event.name == "layers")
    half = (state / "step-00003.hidden").stat().st_size // 2
    with (
        limited(resource.RLIMIT_FSIZE, half),
        pytest.raises(OutputError, match=r"Writing to .* failed: .*Make room there and run it again with --resume"),
    ):
        list(events)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert finish(recipe, tmp_path, llamacpp) == (3, [])
    assert result(tmp_path) == known.result


def test_the_model_is_gone_before_files_are_written(
    recipe: Recipe, llamacpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding and head in float32 are no use any more, nor is the plan."""
    made: list[weakref.ref[Any]] = []
    for name in ("LazyModel", "Plan"):
        kind = getattr(pipeline, name)

        def make(*given: Any, kind: Any = kind) -> Any:
            made.append(weakref.ref(fresh := kind(*given)))
            return fresh

        monkeypatch.setattr(pipeline, name, make)
    quick = replace(recipe, transforms="none", attention_aware=None)
    events = begin(quick, tmp_path, llamacpp)
    next(event for event in events if isinstance(event, Stage) and event.name == "write")
    gc.collect()
    assert made and not any(each() for each in made)
    events.close()


def test_a_shard_that_disappears(recipe: Recipe, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    model = Path(shutil.copytree(recipe.model, tmp_path / Path(recipe.model).name))
    quick = replace(recipe, model=str(model), transforms="none", method="rtn", attention_aware=None)
    alone, output = tmp_path / "alone", tmp_path / "out"
    list(run(quick, alone, llamacpp=llamacpp, held=None))
    events = begin(quick, output, llamacpp)
    next(event for event in events if isinstance(event, Step) and event.done > 1)
    weights = (model / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was there when the run began and cannot be read"):
        list(events)
    weights.rename(model / "model.safetensors")
    assert [path.name for path in output.iterdir()] == [FOLDER]
    assert finish(quick, output, llamacpp)[0] > 0
    assert result(output) == result(alone)


def test_memory_that_runs_out_names_the_phase(
    recipe: Recipe, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """No more than what is in use may be had once the blocks begin, and they want 30 MB a tensor."""
    greedy = replace(recipe, transforms="none", calibration=str(english), samples=2000, micro_batch=2000)
    events = begin(greedy, tmp_path, llamacpp)
    next(event for event in events if isinstance(event, Stage) and event.name == "layers")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with (
        limited(resource.RLIMIT_AS, used),
        pytest.raises(OutOfMemoryError, match=r"in the stage 'layers' .*--micro-batch \(it is 2000\), fewer --samples"),
    ):
        list(events)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
