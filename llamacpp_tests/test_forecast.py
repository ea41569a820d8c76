"""What `plan` says against what `quantize` then does: types and sizes to the byte, memory within a quarter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qronos_export import pipeline
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.cli import app
from qronos_export.errors import CheckpointError, QronosError, UsageError
from qronos_export.events import Finished
from qronos_export.forecast import forecast
from qronos_export.llamacpp import LlamaCpp
from qronos_export.recipe import Recipe
from tests.families import make

NEAREST, ROTATED = {"method": "rtn"}, {"transforms": "hadamard", "samples": 4, "sequence_length": 32}


@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 512}, NEAREST),
        ("llama_tied", {}, ROTATED),  # rows of 64 and 192: substitutes; what is tied comes apart
        ("phi3", {}, NEAREST),  # fused q, k and v
        ("qwen3_moe", {}, ROTATED),
    ],
)
def test_types_and_sizes_are_what_is_written(
    family: str, config: dict[str, int], options: dict[str, Any], llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    folder = make(family, tmp_path / "tiny", **config)
    recipe = Recipe(str(folder), "Q4_0,Q4_K_M", calibration=str(english), **options)
    said = forecast(recipe, llamacpp)
    *_, finished = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=None)
    assert isinstance(finished, Finished)
    for file, artifact in zip(said.files, finished.report.artifacts, strict=True):
        written = GGUFFile(tmp_path / "out" / artifact.path)
        assert file.name == artifact.path
        assert file.bytes == artifact.bytes
        assert file.bits_per_weight == artifact.bits_per_weight
        assert file.types == {tensor.name: tensor.type for tensor in written.tensors.values()}
    substitutes = [{"artifact": f.format, **each} for f in said.files for each in f.substitutes]
    assert substitutes == finished.report.substitutes
    assert not finished.report.kept


@pytest.mark.parametrize(
    ("format", "artifact", "bits"),
    [("INT4_G64", "onnx", 4.25), ("TERNARY", "onnx-plain", 2.25), ("MXINT8", "onnx-mx", 8.25)],
)
def test_types_that_gguf_lacks(format: str, artifact: str, bits: float, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """There is no file to predict, but what its blocks take, and all the rest."""
    recipe = Recipe(
        str(make("llama", tmp_path / "tiny")), format, artifact=artifact, method="gptq", pure=True, samples=4,
        sequence_length=32,
    )  # fmt: skip
    (said,) = (found := forecast(recipe, llamacpp)).files
    assert said.name == "tiny-" + format + ", its blocks"
    assert set(said.types.values()) == {format, "F32"}
    assert said.bits_per_weight == pytest.approx(bits, rel=0.05)
    assert found.seconds["rounding"] > 0 and found.peak_memory_bytes > said.bytes
    assert any("ONNX" in note for note in found.notes)


@pytest.mark.parametrize(
    ("config", "samples", "offload"),
    [
        ({"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}, (4, 64), "none"),  # weights
        ({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}, (64, 256), "none"),  # tokens
        ({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}, (64, 256), "disk"),
    ],
)
def test_memory_is_within_a_quarter(
    config: dict[str, int], samples: tuple[int, int], offload: str, english: Path, tmp_path: Path
) -> None:
    """Each in a process of its own, since a peak is a process's."""
    make("llama", tmp_path / "tiny", **config)
    options = ["--calibration", english, "--samples", samples[0], "--sequence-length", samples[1], "--offload", offload]
    options = [str(each) for each in [tmp_path / "tiny", "--no-attention-aware", *options]]
    command = [sys.executable, "-m", "qronos_export"]
    shown = subprocess.run([*command, "plan", *options, "--json"], capture_output=True, text=True, check=True).stdout
    said = json.loads(shown)
    subprocess.run(
        [*command, "quantize", *options, "--no-validate", "--output", tmp_path / "out"], capture_output=True, check=True
    )
    actual = json.loads((tmp_path / "out" / "report.json").read_text())["peak_memory_bytes"]
    assert said["peak_memory_bytes"] == pytest.approx(actual, rel=0.25)
    assert said["peak_memory_bytes"] == sum(said["memory"][said["moment"]].values())


def test_depth_takes_disk_and_time_but_no_memory(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    said = []
    for layers in (1, 3):
        folder = make("llama", tmp_path / f"{layers}" / "tiny", num_hidden_layers=layers)
        said.append(forecast(Recipe(str(folder), calibration=str(english), samples=4, sequence_length=32), llamacpp))
    shallow, deep = said
    assert deep.flops["forwards"] == pytest.approx(3 * shallow.flops["forwards"], rel=1e-6)
    assert sum(deep.disk.values()) > sum(shallow.disk.values())
    for one, three in zip(shallow.memory.values(), deep.memory.values(), strict=False):
        parts = [{k: v for k, v in each.items() if k not in ("interpreter", "hashes of rows")} for each in (one, three)]
        assert parts[0] == parts[1]


def test_a_run_of_a_model_three_times_as_deep_takes_no_more_memory(english: Path, tmp_path: Path) -> None:
    """Of layers so large that four more, in both streams, would be a quarter of the peak."""
    peaks = []
    for layers in (2, 6):
        folder = tmp_path / f"{layers}"
        make("llama", folder / "tiny", hidden_size=512, intermediate_size=2048, num_hidden_layers=layers)
        options = ["--calibration", english, "--samples", 4, "--sequence-length", 64, "--no-validate"]
        command = [sys.executable, "-m", "qronos_export", "quantize", folder / "tiny", "--output", folder / "out"]
        subprocess.run([*map(str, [*command, *options])], capture_output=True, check=True)
        peaks.append(json.loads((folder / "out" / "report.json").read_text())["peak_memory_bytes"])
    assert peaks[1] < 1.1 * peaks[0]


def test_wishes_reach_the_plan_from_the_command_line(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "tiny")

    def types(*wishes: str) -> dict[str, str]:
        shown = CliRunner().invoke(
            app, ["plan", str(folder), "--format", "Q4_0", "--llamacpp", str(llamacpp.bin_folder), "--json", *wishes]
        )
        assert shown.exit_code == 0, shown.output
        (file,) = json.loads(shown.stdout)["files"]
        found: dict[str, str] = file["types"]
        return found

    plain, pure = types(), types("--pure")
    assert plain["blk.0.ffn_down.weight"] == "Q4_0" != plain["output.weight"]
    assert {found for name, found in pure.items() if not name.endswith("norm.weight")} == {"Q4_0"}
    wished = types(
        "--override", "blk.0.*down*=Q8_0", "--override", "*down*=Q5_1", "--output-type", "Q5_0",
        "--embedding-type", "Q4_1",
    )  # fmt: skip
    changed = {
        "blk.0.ffn_down.weight": "Q8_0", "blk.1.ffn_down.weight": "Q5_1", "output.weight": "Q5_0",
        "token_embd.weight": "Q4_1",
    }  # fmt: skip
    assert wished == {**plain, **changed}


def test_refuses_what_quantize_refuses(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    refused: list[tuple[Recipe, type[QronosError]]] = [
        (Recipe("demo", "Q4_X"), UsageError),
        (Recipe("demo", activations="int4"), UsageError),
        (Recipe(str(tmp_path / "absent")), CheckpointError),
    ]
    for recipe, kind in refused:
        with pytest.raises(kind):
            forecast(recipe, llamacpp)
