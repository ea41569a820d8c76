"""The project's own gate: a change that makes quantization worse fails here.

A run short enough for every change, so without the default transform and attention-aware rounding, which others test.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qronos_export import pipeline
from qronos_export.checkpoint import open_checkpoint, tokenizer
from qronos_export.corpus import held_out_text
from qronos_export.events import Finished
from qronos_export.gate import load_gates
from qronos_export.llamacpp import LlamaCpp
from qronos_export.proof import float_file
from qronos_export.recipe import Recipe
from qronos_export.validation import Reference

GATE = Path(__file__).with_name("demo_gate.yaml")
SAMPLES, LENGTH = 8, 256


def test_ours_keeps_its_distance_to_an_imatrix(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    text, tools = held_out_text(), replace(llamacpp, threads=1)
    (tmp_path / "held.txt").write_text(text[len(text) // 2 :])
    checkpoint = open_checkpoint("demo")
    encoded = tokenizer(checkpoint)(text[:20_000], return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    # Too short for a choice of windows: both calibrate on the very same tokens.
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(text[: encoded["offset_mapping"][SAMPLES * LENGTH + 100][1]])

    original = float_file(checkpoint, tools, tmp_path)
    imatrix = tools.imatrix(original, calibration, tmp_path / "imatrix.gguf", context=LENGTH, chunks=SAMPLES)
    # With an imatrix llama-quantize raises some ffn_down of Q4_0 to Q4_1; equal bytes need equal types.
    types = {"ffn_down": "q4_0"}
    theirs = tools.quantize(original, tmp_path / "theirs.gguf", "Q4_0", imatrix=imatrix, tensor_types=types)
    recipe = Recipe(
        str(original), "Q4_0", calibration=str(calibration), samples=SAMPLES, sequence_length=LENGTH,
        attention_aware=False, transforms="none", device="cpu",
    )  # fmt: skip
    *_, done = pipeline.run(recipe, tmp_path / "ours", llamacpp=tools, held=None)
    assert isinstance(done, Finished)
    ours = tmp_path / "ours" / done.report.artifacts[0].path
    assert abs(ours.stat().st_size - theirs.stat().st_size) < 4096  # but for a few keys

    with Reference(
        original, tmp_path / "held.txt", llamacpp=tools, workspace=tmp_path, context=128, chunks=16
    ) as reference:
        found, base = reference.compare(ours), reference.compare(theirs)
    (tmp_path / "imatrix.json").write_text(json.dumps(base.to_json()))
    gates = load_gates(GATE, tmp_path / "imatrix.json")
    (verdict,) = gates.verdicts(found)
    assert verdict.passed, verdict.says
    assert not gates.verdicts(base)[0].passed  # it can fail
