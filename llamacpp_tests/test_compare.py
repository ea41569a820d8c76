"""Files side by side, and the gate on the command line and in the action: tiny models, real llama.cpp."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner, Result

from qronos_export import pipeline
from qronos_export.checkpoint import load_whole, open_checkpoint
from qronos_export.cli import app
from qronos_export.comparison import compare
from qronos_export.corpus import held_out_tokens
from qronos_export.errors import ArtifactError, GateError, LlamaCppError, UsageError
from qronos_export.llamacpp import BENCH, TOOLS, LlamaCpp
from qronos_export.proof import Held
from qronos_export.recipe import Recipe
from qronos_export.validation import Reference
from tests.families import make

ACTION = Path(__file__).parents[1] / ".github" / "actions" / "validate" / "action.yml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("compare") / "tiny")


@pytest.fixture(scope="module")
def original(tiny: Path, llamacpp: LlamaCpp) -> Path:
    return llamacpp.convert(tiny, tiny.parent / "float.gguf", "f32")


@pytest.fixture(scope="module")
def files(tiny: Path, llamacpp: LlamaCpp) -> dict[str, Path]:
    """By what their names end in, all of one run."""
    folder = tiny.parent / "out"
    recipe = Recipe(str(tiny), "Q4_0,Q8_0", artifact="gguf,onnx", method="rtn", device="cpu")
    *_, _ = pipeline.run(recipe, folder, llamacpp=llamacpp, held=None)
    return {name: folder / f"tiny-{name}" for name in ("Q4_0.gguf", "Q8_0.gguf", "Q8_0-onnx")}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_chunks_of_llama_perplexity_are_those_of_torch(
    tiny: Path, original: Path, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """The float file against itself: losses chunk by chunk, and no divergence in any."""
    with Reference(original, english, llamacpp=llamacpp, workspace=tmp_path, context=64, chunks=12) as reference:
        found = reference.compare(original)
    assert found.per_chunk is not None and len(found.per_chunk.loss) == 12
    checkpoint = open_checkpoint(str(tiny))
    tokens = held_out_tokens(english, checkpoint, 64, 12)
    with torch.no_grad():
        logits = load_whole(checkpoint)(tokens).logits[:, 32:-1].float()
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 33:], reduction="none").mean(1)
    assert found.per_chunk.loss == pytest.approx(expected.tolist(), abs=5e-3)
    assert found.per_chunk.kl_divergence == pytest.approx([0] * 12, abs=2e-4)
    assert math.exp(fmean(found.per_chunk.loss)) == pytest.approx(found.perplexity, rel=1e-5)


def test_compare_measures_each_file_and_every_pair(
    files: dict[str, Path], tiny: Path, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    more = ("--text", english, "--context", 64, "--chunks", 12, "--plot", tmp_path / "plot.png", "--speed")
    done = run("compare", *files.values(), "--reference", tiny, *more, "--json")
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    four, eight, onnx = result["files"]
    assert [each["file"] for each in result["files"]] == [f"tiny-{name}" for name in files]
    assert [each["bytes"] for each in (four, eight)] == [files[n].stat().st_size for n in ("Q4_0.gguf", "Q8_0.gguf")]
    assert 4.5 < four["bits_per_weight"] < eight["bits_per_weight"] < 9 < onnx["bits_per_weight"] < 12
    for each in result["files"]:
        v = each["validation"]
        for key in ("kl_divergence", "same_top"):
            assert fmean(v["per_chunk"][key]) == pytest.approx(v[key], rel=1e-3, abs=1e-5)  # decimals printed
        assert math.exp(fmean(v["per_chunk"]["loss"])) == pytest.approx(v["perplexity"], rel=1e-4)
        for rate in ("prompt", "generation"):
            assert 0 <= each[rate]["error"] < each[rate]["mean"] < math.inf
    # The same integers in another runtime: less apart, chunk by chunk, than Q4_0 is from Q8_0.
    assert onnx["validation"]["per_chunk"]["loss"] == pytest.approx(eight["validation"]["per_chunk"]["loss"], abs=0.05)
    by_names = {(pair["a"], pair["b"]): pair for pair in result["pairs"]}
    assert set(by_names) == {
        ("tiny-Q4_0.gguf", "tiny-Q8_0.gguf"), ("tiny-Q4_0.gguf", "tiny-Q8_0-onnx"),
        ("tiny-Q8_0.gguf", "tiny-Q8_0-onnx"),
    }  # fmt: skip
    apart = by_names["tiny-Q4_0.gguf", "tiny-Q8_0.gguf"]["kl_divergence"]
    means = [each["validation"]["kl_divergence"] for each in (four, eight)]
    assert apart["mean"] == pytest.approx(means[0] - means[1], abs=1e-4)
    assert apart["p"] < 0.01 and apart["mean"] > 4 * apart["error"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_the_table_says_which_differences_are_real(
    files: dict[str, Path], original: Path, english: Path, tmp_path: Path
) -> None:
    twin = shutil.copy(files["Q8_0.gguf"], tmp_path / "twin.gguf")
    more = ("--reference", original, "--text", english, "--context", 64, "--chunks", 8)
    done = run("compare", files["Q4_0.gguf"], files["Q8_0.gguf"], twin, *more)
    assert done.exit_code == 0, done.exception
    assert f"{files['Q4_0.gguf'].stat().st_size:,}" in done.stdout and "8 chunks of 64 tokens" in done.stdout
    assert "tiny-Q8_0.gguf and twin.gguf cannot be told apart on these chunks: KL divergence 0.00000" in done.stdout
    assert "twin.gguf is better than tiny-Q4_0.gguf: KL divergence" in done.stdout


def test_compare_refuses(files: dict[str, Path], original: Path, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    file = files["Q4_0.gguf"]
    for arguments, says in (
        ((file, file), "given twice"),
        ((file, tmp_path / "absent.gguf"), "absent.gguf does not exist"),
        ((file, "--chunks", 1), "at least two --chunks"),
        ((file, "--plot", tmp_path / "plot.exe"), "ends in .png"),
        ((file, "--plot", tmp_path / "absent" / "plot.png"), "a folder that exists"),
    ):
        refused = run("compare", *arguments, "--reference", original).exception
        assert isinstance(refused, UsageError) and says in str(refused)
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(llamacpp.bin_folder / tool)
    without = LlamaCpp(tmp_path, None, llamacpp.version, "a test")
    with pytest.raises(
        LlamaCppError, match=rf"measured by {BENCH}, which .* lacks. Run `qronos-export llamacpp install`"
    ):
        without.rates(file, prompt=8, new=8, rounds=2)


def test_files_that_cannot_be_opened_are_found_before_any_model_runs(files: dict[str, Path], tmp_path: Path) -> None:
    (text := tmp_path / "text.gguf").write_text("no model")
    (part := tmp_path / "part.gguf").write_bytes(files["Q4_0.gguf"].read_bytes()[:-100])
    (empty := tmp_path / "empty").mkdir()
    (short := tmp_path / "short.onnx").write_bytes(b"\x00no model")
    good = [files["Q4_0.gguf"], files["Q8_0-onnx"]]
    for bad, kind, says in (
        (text, ArtifactError, "text.gguf is not a readable GGUF file"),
        (part, ArtifactError, "it is truncated"),
        (empty, UsageError, "empty is no ONNX model"),
        (short, ArtifactError, "short.onnx cannot be read as ONNX"),
    ):
        events = compare([*good, bad], "absent", Held(None, 64, 4), find=lambda: pytest.fail("llama.cpp was asked for"))
        with pytest.raises(kind, match=says):
            next(events)


def test_a_gate_with_a_baseline(files: dict[str, Path], original: Path, english: Path, tmp_path: Path) -> None:
    """What `validate --json` printed of one file is a limit for the next; JUnit and summary say what became of it."""
    more = ("--reference", original, "--text", english, "--context", 64, "--chunks", 8)
    stored = run("validate", files["Q8_0.gguf"], *more, "--json")
    (tmp_path / "baseline.json").write_text(stored.stdout)
    gate = tmp_path / "gate.yaml"
    gate.write_text("max_kl_max: 100\nbaseline: baseline.json\nkld: {ratio: 1.05}\nsame_top: {}\n")
    gated = (*more, "--gate", gate, "--junit", tmp_path / "junit.xml", "--summary", tmp_path / "summary.md")
    again = run("validate", files["Q8_0.gguf"], *gated)
    assert again.exit_code == 0, again.exception
    assert "KL divergence" in again.stdout and "keeps 1.05 × the baseline's" in again.stdout
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().get("failures") == "0"
    worse = run("validate", files["Q4_0.gguf"], *gated)
    assert isinstance(worse.exception, GateError) and "misses 1.05 × the baseline's" in str(worse.exception)
    cases = {case.get("name"): len(case) for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}
    assert cases == {"max_kl_max": 0, "kld": 1, "same_top": 1}
    assert "2 of 3 limits missed" in (tmp_path / "summary.md").read_text()
    none = run("validate", files["Q8_0.gguf"], *more, "--junit", tmp_path / "junit.xml")
    assert isinstance(none.exception, UsageError) and "there is none; give --gate" in str(none.exception)


@pytest.mark.parametrize(("limit", "code"), [(100, 0), (1e-6, 1)])
def test_the_action_runs_what_it_says(
    limit: float, code: int, files: dict[str, Path], original: Path, english: Path, tmp_path: Path
) -> None:
    """Its last step, as a runner runs bash, with its own defaults where nothing is given."""
    action: dict[str, Any] = yaml.safe_load(ACTION.read_text())
    step = action["runs"]["steps"][-1]
    (tmp_path / "a gate.yaml").write_text(f"max_kld: {limit}\n")
    given = {
        "file": files["Q4_0.gguf"], "reference": original, "gate": "a gate.yaml", "text": english, "context": 64,
        "chunks": 4,
    }  # fmt: skip
    inputs = {name: str(given.get(name, entry.get("default"))) for name, entry in action["inputs"].items()}
    read = {variable: value.removeprefix("${{ inputs.").removesuffix(" }}") for variable, value in step["env"].items()}
    environment = {
        **os.environ, **{variable: inputs[name] for variable, name in read.items()},
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ACTION.parents[3]),
    }  # fmt: skip
    script = tmp_path / "step.sh"
    script.write_text(step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert json.loads((tmp_path / inputs["json"]).read_text())["passed"] is (code == 0)
    root = ElementTree.parse(tmp_path / inputs["junit"]).getroot()
    assert (root.get("tests"), root.get("failures")) == ("1", str(code))
    assert (tmp_path / "summary.md").read_text().startswith("### tiny-Q4\\_0.gguf: " + ("1 of 1" if code else "passed"))
