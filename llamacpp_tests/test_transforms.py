"""A transformed model in llama.cpp: the same function as a float file; its quantized file, against the original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from qronos_export import folding, layers, pipeline
from qronos_export.checkpoint import open_checkpoint
from qronos_export.errors import TransformError
from qronos_export.events import Finished
from qronos_export.llamacpp import LlamaCpp
from qronos_export.proof import Held
from qronos_export.recipe import TRANSFORMS, Recipe, recipe_from
from qronos_export.rounding import magr
from qronos_export.transformed import PROBE, transformed
from qronos_export.validation import Reference
from tests.families import make


@pytest.mark.parametrize(
    ("family", "settings"), [("llama_tied", {}), ("qwen3_moe", {"num_experts_per_tok": 4}), ("phi3", {})]
)
def test_llamacpp_computes_the_same(
    family: str, settings: dict[str, int], llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """All experts take part: where two are nearly as good, a last bit of float16 keys chooses."""
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny", **settings)))
    after = transformed(
        checkpoint, TRANSFORMS, tokens=PROBE.repeat(8, 1), formats=["Q4_0"], seed=0, micro_batch=8, folder=tmp_path
    )
    before = llamacpp.convert(checkpoint.folder, tmp_path / "before.gguf", "f32")
    file = llamacpp.convert(after.folder, tmp_path / "after.gguf", "f32")
    with Reference(before, english, llamacpp=llamacpp, workspace=tmp_path, context=64, chunks=8) as reference:
        measured = reference.compare(file)
    assert measured.perplexity == pytest.approx(measured.perplexity_reference, rel=1e-3)  # float16 keys and values
    assert abs(measured.kl_divergence) < 1e-5
    assert measured.same_top > 99


@pytest.mark.parametrize("method", ["qronos", "rtn"])
def test_files_are_held_against_the_original(method: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        str(make("llama", tmp_path / "tiny")), "Q8_0", transforms="hadamard", method=method, calibration=str(english),
        samples=8, sequence_length=64, device="cpu",
    )  # fmt: skip
    held = Held(english, context=64, chunks=8)
    *_, finished = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=held)
    assert isinstance(finished, Finished)
    (artifact,) = finished.report.artifacts
    assert artifact.validation is not None
    plain = llamacpp.convert(Path(recipe.model), tmp_path / "plain.gguf", "f32")
    alone = llamacpp.perplexity(plain, english, context=64, chunks=8).value
    assert artifact.validation["perplexity_reference"] == pytest.approx(alone, rel=1e-6)
    assert 0 < artifact.validation["kl_divergence"] < 0.01
    assert finished.report.seconds["transforms"] > 0
    assert (finished.report.calibration is None) == (method == "rtn")
    again = recipe_from(finished.report.to_json()["recipe"], "report.json")
    *_, repeated = pipeline.run(replace(again), tmp_path / "again", llamacpp=llamacpp, held=held)
    assert isinstance(repeated, Finished)
    assert repeated.report.artifacts[0].sha256 == artifact.sha256


def test_columns_are_equalized_unless_told_otherwise(
    llamacpp: LlamaCpp, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default where something is calibrated; a model they do not fit goes without, and the report says so."""
    recipe = Recipe(
        str(make("llama", tmp_path / "tiny")), "Q4_0", calibration=str(english), samples=8, sequence_length=64
    )

    def finish(recipe: Recipe, folder: str) -> Finished:
        *_, finished = pipeline.run(recipe, tmp_path / folder, llamacpp=llamacpp, held=None)
        assert isinstance(finished, Finished)
        return finished

    default, asked, without = (
        finish(replace(recipe, transforms=name), name).report for name in ("auto", "equalize", "none")
    )
    assert (default.recipe["transforms"], without.recipe["transforms"]) == ("equalize", "none")
    assert default.artifacts[0].sha256 == asked.artifacts[0].sha256 != without.artifacts[0].sha256
    files = [GGUFReader(tmp_path / name / default.artifacts[0].path) for name in ("auto", "none")]
    one, other = ({key: field.contents() for key, field in file.fields.items()} for file in files)
    assert one.pop("qronos_export.recipe") != other.pop("qronos_export.recipe")
    assert {key: one[key] for key in one if key[:5] != "GGUF."} == {
        key: other[key] for key in other if key[:5] != "GGUF."
    }  # the name among them
    assert default.artifacts[0].bits_per_weight == without.artifacts[0].bits_per_weight  # the keys name the recipe
    assert finish(replace(recipe, method="rtn"), "rtn").report.recipe["transforms"] == "none"

    def refuse(*_: object, **__: object) -> None:
        raise TransformError("equalize does not fit tiny: it is odd.")

    monkeypatch.setattr(folding, "transformed", refuse)
    refused = finish(recipe, "refused").report
    assert (refused.recipe["transforms"], refused.notes) == ("none", ["equalize does not fit tiny: it is odd."])
    assert refused.artifacts[0].sha256 == without.artifacts[0].sha256
    with pytest.raises(TransformError, match="it is odd"):
        finish(replace(recipe, transforms="equalize"), "insisted")
    assert not (tmp_path / "insisted").exists()


def test_few_bits_after_rotations_and_magr(
    llamacpp: LlamaCpp, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp runs the files; MagR lowers extremes among those weights that share a scale."""
    groups: dict[str, set[int]] = {}

    def seen(weight: torch.Tensor, hessian: torch.Tensor, alpha: float, group: int) -> torch.Tensor:
        lowered = magr(weight, hessian, alpha, group)
        assert float((lowered - weight).abs().max()) > 0
        groups.setdefault(str(group), set()).add(weight.shape[1])
        return lowered

    monkeypatch.setattr(layers, "magr", seen)
    model = make("llama", tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    recipe = Recipe(
        str(model), "Q2_K,TQ2_0,TQ1_0", transforms="hadamard", magr=0.03, calibration=str(english), samples=8,
        sequence_length=64, device="cpu", pure=True,
    )  # fmt: skip
    *_, finished = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=Held(english, context=64, chunks=8))
    assert isinstance(finished, Finished)
    assert groups == {"16": {256, 512}, "256": {256, 512}, "32": {128}}  # what 256 does not divide is Q4_0
    by_format = {each.format: each.validation or {} for each in finished.report.artifacts}
    assert by_format["TQ1_0"]["kl_divergence"] == pytest.approx(by_format["TQ2_0"]["kl_divergence"], rel=0.05)
    assert by_format["Q2_K"]["kl_divergence"] < by_format["TQ2_0"]["kl_divergence"]
    blocks = [layer for layer in finished.report.layers if "blk." in layer.tensor]
    assert blocks and all("MagR moved the outputs" in layer.note for layer in blocks)


@pytest.mark.parametrize("source", ["bf16", "gguf", "experts"])
def test_whatever_a_model_is_stored_as(
    source: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of sixteen bits would change the model; they are kept in 32, and so is what no format rounds."""
    monkeypatch.setenv("QRONOS_EXPORT_CACHE", str(tmp_path / "cache"))
    dtype = torch.bfloat16 if source == "bf16" else torch.float32
    model = make("qwen3_moe" if source == "experts" else "llama", tmp_path / "tiny", dtype=dtype)
    if source == "gguf":
        model = llamacpp.convert(model, tmp_path / "float.gguf", "f32")
    recipe = Recipe(str(model), "Q8_0,Q4_0", calibration=str(english), samples=8, sequence_length=64, device="cpu")
    held = Held(english, context=64, chunks=8)
    *_, finished = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=held)
    assert isinstance(finished, Finished)
    assert (finished.report.recipe["transforms"], finished.report.notes) == ("equalize", [])
    fine, coarse = (artifact.validation["kl_divergence"] for artifact in finished.report.artifacts)
    assert 0 < fine < (0.05 if source == "experts" else 0.02) and fine < coarse  # experts: tokens routed elsewhere
