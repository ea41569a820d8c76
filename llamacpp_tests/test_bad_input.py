"""Bad input through the real command: one clear message, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qronos_export.cli import main
from qronos_export.llamacpp import LlamaCpp
from tests.families import make
from tests.hub_server import hub


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qronos-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def refused(done: Done, output: Path, says: str, code: int = 1) -> None:
    assert done.code == code, done.err
    assert says in done.err.replace("\n", " "), done.err
    assert "Traceback" not in done.err
    assert not output.exists() or not any(output.iterdir()), "something was left behind"


def quantize(command, model: object, output: Path, english: Path, *options: object) -> Done:
    small = ("--samples", 4, "--sequence-length", 64, "--no-validate")
    return command("quantize", model, "--output", output, "--calibration", english, *small, *options)


def test_truncated_shard(command, broken: Path, tmp_path: Path, english: Path) -> None:
    file = broken / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    refused(quantize(command, broken, tmp_path / "out", english), tmp_path / "out", "model.safetensors")


def test_missing_shard(command, broken: Path, tmp_path: Path, english: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    done = quantize(command, broken, tmp_path / "out", english)
    refused(done, tmp_path / "out", "lacks the shard model-00002-of-00002.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(command, broken: Path, tmp_path: Path, english: Path, value: float) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = quantize(command, broken, tmp_path / "out", english)
    refused(done, tmp_path / "out", "model.layers.1.mlp.up_proj.weight")


def test_unknown_architecture(command, broken: Path, tmp_path: Path, english: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "llama9000"}))
    refused(quantize(command, broken, tmp_path / "out", english), tmp_path / "out", "'llama9000'")


def test_rows_that_no_block_divides(command, tmp_path: Path, english: Path) -> None:
    odd = make("llama", tmp_path / "odd", hidden_size=48, intermediate_size=80, head_dim=12)
    refused(quantize(command, odd, tmp_path / "out", english), tmp_path / "out", "do not divide into blocks of 32")


def test_calibration_text_too_short(command, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Far too short.")
    refused(quantize(command, tiny, tmp_path / "out", text), tmp_path / "out", "short.txt")


def test_held_out_text_too_short_is_said_before_anything_is_computed(
    command, tiny: Path, tmp_path: Path, english: Path
) -> None:
    text, output = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("Far too short.")
    done = command("quantize", tiny, "--output", output, "--calibration", english, "--text", text)
    refused(done, output, "two chunks need 1024")


def test_no_llamacpp(command, tiny: Path, tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRONOS_EXPORT_LLAMACPP", raising=False)
    monkeypatch.setenv("QRONOS_EXPORT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", "/nowhere")
    done = quantize(command, tiny, tmp_path / "out", english)
    refused(done, tmp_path / "out", "qronos-export llamacpp install")


def test_results_are_not_overwritten_unless_forced(command, tiny: Path, tmp_path: Path, english: Path) -> None:
    output = tmp_path / "out"
    assert quantize(command, tiny, output, english, "--method", "rtn").code == 0
    before = (output / "report.json").read_bytes()
    done = quantize(command, tiny, output, english, "--method", "rtn")
    assert done.code == 1 and "exists already" in done.err and "--force" in done.err
    assert (output / "report.json").read_bytes() == before
    assert quantize(command, tiny, output, english, "--method", "rtn", "--force").code == 0


def test_no_such_model(command, tmp_path: Path, english: Path) -> None:
    refused(quantize(command, tmp_path / "nothing", tmp_path / "out", english), tmp_path / "out", "does not exist")


def test_no_such_repository_on_the_hub(tmp_path: Path, english: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT once."""
    output = tmp_path / "out"
    command = ["quantize", "someone/absent", "--output", output, "--calibration", english, "--no-validate"]
    with hub({}) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "qronos_export", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    refused(Done(done.returncode, done.stdout, done.stderr), output, "neither a folder here nor a model on http")


def test_no_disk_space(command, tiny: Path, tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    refused(quantize(command, tiny, tmp_path / "out", english), tmp_path / "out", "GB free")


def test_no_such_device(command, tiny: Path, tmp_path: Path, english: Path) -> None:
    done = quantize(command, tiny, tmp_path / "out", english, "--device", "cuda:99")
    refused(done, tmp_path / "out", "--device cuda:99 is not available", code=2)


def test_debug_shows_the_traceback(command, tmp_path: Path) -> None:
    done = command("--debug", "quantize", tmp_path / "nothing", "--output", tmp_path / "out")
    assert done.code == 1 and "Traceback" in done.err


def test_gates(command, tiny: Path, llamacpp: LlamaCpp, tmp_path: Path, english: Path) -> None:
    """`validate` exits 1 naming the limit that was missed, 0 when all are kept, 2 for limits that are none."""
    output = tmp_path / "out"
    assert quantize(command, tiny, output, english, "--method", "rtn").code == 0
    check = (
        "validate",
        output / "llama-Q4_0.gguf",
        "--reference",
        tiny,
        "--text",
        english,
        "--context",
        128,
        "--chunks",
        2,
    )
    good = command(*check, "--max-kld", 50, "--json")
    assert good.code == 0, good.err
    assert json.loads(good.out)["passed"] is True
    missed = command(*check, "--max-kld", 1e-6, "--json")
    assert missed.code == 1 and "--max-kld" in missed.err
    assert json.loads(missed.out)["kl_divergence"] == pytest.approx(json.loads(good.out)["kl_divergence"], rel=1e-3)
    assert command(*check, "--max-kld", -1).code == 2
    few = command(*check, "--chunks", 1)
    assert few.code == 1 and "63 that are scored, and llama.cpp compares files on 100 or more" in " ".join(
        few.err.split()
    )


def test_too_little_text_to_compare_on_is_refused_before_anything(command, tiny: Path, tmp_path: Path) -> None:
    options = ("--output", tmp_path / "out", "--method", "rtn", "--context", 64, "--chunks", 2)
    few = command("quantize", tiny, *options)
    assert few.code == 1 and "62 that are scored" in " ".join(few.err.split())
    assert not (tmp_path / "out").exists()


def test_summary_names_the_file_and_its_size(command, tiny: Path, tmp_path: Path, english: Path) -> None:
    done = quantize(command, tiny, tmp_path / "out", english)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert done.code == 0 and "llama-Q4_0.gguf" in done.out.replace("\n", "").replace(" ", "")
    assert f"{report['artifacts'][0]['bits_per_weight']:.3f} bits a weight" in done.out
    assert report["schema"] == 1 and set(report["seconds"]) >= {"load", "forward", "statistics", "rounding", "write"}
    assert all(torch.isfinite(torch.tensor(layer["error"])) for layer in report["layers"])


def test_a_reports_recipe_given_to_the_command_makes_the_same_bytes(
    command, tiny: Path, tmp_path: Path, english: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the colour of the sky when it rains?\n")
    assert quantize(command, tiny, tmp_path / "out", english, "--match-lengths", prompts).code == 0
    prompts.unlink()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["sequence_length"] < 64 and report["calibration"]["tokens"] >= 4 * 64
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(report["recipe"]), encoding="utf-8")
    again = command("quantize", "--recipe", file, "--output", tmp_path / "again", "--no-validate")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / "report.json").read_text())["artifacts"] == report["artifacts"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("activations: int4", "activations: int4 is for `evaluate` alone: llama.cpp rounds what a matrix reads"),
        ("online: r4", "online: r4 is for `evaluate` alone: llama.cpp rotates nothing"),
        ("kv_cache: {k: int4}", "kv_cache: {k: int4} is for `evaluate` alone: llama.cpp's cache has no such type"),
        ("format: INT4_G32", "--format INT4_G32 is no type of GGUF; use --artifact onnx"),
        ("magr: 0.01", "method: rtn looks at no activations"),
    ],
)
def test_what_no_runtime_executes_is_for_evaluate(setting: str, says: str, tiny: Path, tmp_path: Path, command) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: rtn\n{setting}\n")
    done = command("quantize", tiny, "-o", tmp_path / "out", "--recipe", recipe)
    assert (done.code, done.out) == (2, "") and says in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()
    evaluated = command(
        "evaluate", tiny, "--recipe", recipe, "--set", "format=INT4_G32", "--chunks", 2, "--context", 64, "--json"
    )
    assert evaluated.code == 0 and json.loads(evaluated.out)["kl_divergence"] > 0


def test_a_cache_that_nothing_would_look_at(tiny: Path, tmp_path: Path, command) -> None:
    settings = ["--method", "rtn", "--set", "kv_cache={k: q8_0}", "--no-validate"]
    done = command("quantize", tiny, "-o", tmp_path / "out", *settings)
    assert done.code == 2 and "kv_cache does nothing" in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()
