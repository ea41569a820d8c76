"""The measures of a file and the gate, with real models and real llama.cpp."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from formats import FORMATS
from qronos_export import pipeline, streams
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.calibration import block_matrices
from qronos_export.checkpoint import LazyModel, open_checkpoint
from qronos_export.checkpoint.lazy import read_finite
from qronos_export.errors import CalibrationError, LlamaCppError, OutputError, UsageError
from qronos_export.evaluation import Evaluated, evaluate
from qronos_export.events import Finished
from qronos_export.llamacpp import LlamaCpp
from qronos_export.plan import Plan
from qronos_export.proof import Held
from qronos_export.recipe import Recipe
from qronos_export.report import Artifact
from qronos_export.streams import rounded_cache
from qronos_export.validation import Cache, Gate, Reference, Validation, validate
from tests.families import make

REPORT_KEYS = {
    "perplexity",
    "perplexity_reference",
    "kl_divergence",
    "kl_divergence_error",
    "same_top",
    "context",
    "chunks",
    "text_sha256",
    "llama_cpp",
}


@pytest.fixture(scope="module")
def validations(
    llamacpp: LlamaCpp,
    demo_gguf: Path,
    coarse_gguf: Path,
    english: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Validation, Validation]:
    """The demo model against itself and the coarse one against it, from one run of the reference."""
    workspace = tmp_path_factory.mktemp("workspace")
    with Reference(demo_gguf, english, llamacpp=llamacpp, workspace=workspace, context=64, chunks=4) as reference:
        assert len(list(workspace.iterdir())) == 1
        both = reference.compare(demo_gguf), reference.compare(coarse_gguf)
    assert list(workspace.iterdir()) == []
    return both


def test_a_file_is_its_own_equal(validations: tuple[Validation, Validation]) -> None:
    same, _ = validations
    assert abs(same.kl_divergence) < 1e-4
    assert abs(same.perplexity_increase) < 0.01
    assert same.same_top > 99


def test_a_coarser_file_diverges(validations: tuple[Validation, Validation]) -> None:
    same, coarse = validations
    assert coarse.kl_divergence > 0.05
    assert coarse.perplexity_increase > 1
    assert coarse.perplexity_reference == same.perplexity_reference


def test_a_cache_of_few_bits_costs_something(
    validations: tuple[Validation, Validation], llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path
) -> None:
    """The file is its own reference, so the cache is all that differs."""
    costs = []
    for cache in (Cache("q8_0", "q8_0"), Cache("q8_0", "q4_0")):
        with Reference(
            demo_gguf, english, llamacpp=llamacpp, workspace=tmp_path, context=64, chunks=4, cache=cache
        ) as reference:
            found = reference.compare(demo_gguf)
        assert (found.cache_k, found.cache_v) == (cache.k, cache.v)
        costs.append(found.kl_divergence)
    assert validations[0].kl_divergence < costs[0] < costs[1]
    assert validations[0].cache_k == "f16"
    with pytest.raises(UsageError, match=r"--cache-type-v is 'q2_k'; llama\.cpp's cache has"):
        Cache("f16", "q2_k")


def test_the_report_has_its_stable_keys(
    validations: tuple[Validation, Validation], english: Path, llamacpp: LlamaCpp
) -> None:
    report = json.loads(json.dumps(validations[1].to_json(), allow_nan=False))
    assert set(report) >= REPORT_KEYS
    assert (report["context"], report["chunks"], report["llama_cpp"]) == (64, 4, llamacpp.version)
    assert report["text_sha256"] == hashlib.sha256(english.read_bytes()).hexdigest()


def test_the_gate_names_each_limit_and_the_value_that_missed_it(validations: tuple[Validation, Validation]) -> None:
    same, coarse = validations
    gate = Gate(max_kld=0.01, max_ppl_increase=0.5)
    assert gate.check(same) == []
    kld, increase = gate.check(coarse)
    assert f"{coarse.kl_divergence:.6g}" in kld and "--max-kld 0.01" in kld
    assert f"{coarse.perplexity_increase:.6g} %" in increase and "--max-ppl-increase 0.5 %" in increase
    assert Gate().check(coarse) == []


def test_the_gate_is_inclusive_and_counts_percent(validations: tuple[Validation, Validation]) -> None:
    exact = replace(validations[0], kl_divergence=0.25, perplexity=12.5, perplexity_reference=10.0)
    assert exact.perplexity_increase == 25
    assert Gate(max_kld=0.25, max_ppl_increase=25).check(exact) == []
    assert len(Gate(max_kld=0.2499, max_ppl_increase=24.99).check(exact)) == 2
    # Not a number is not a pass.
    assert len(Gate(max_kld=1).check(replace(exact, kl_divergence=float("nan")))) == 1


@pytest.mark.parametrize("limit", [-0.1, float("nan"), float("inf")])
def test_a_limit_that_makes_no_sense_is_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="--max-kld"):
        Gate(max_kld=limit)
    with pytest.raises(UsageError, match="--max-ppl-increase"):
        Gate(max_ppl_increase=limit)


def test_failures_leave_the_workspace_empty(llamacpp: LlamaCpp, demo_gguf: Path, english: Path, tmp_path: Path) -> None:
    text, broken, workspace = tmp_path / "short.txt", tmp_path / "broken.gguf", tmp_path / "workspace"
    text.write_text("short")
    broken.write_bytes(b"GGUF?")
    with pytest.raises(OutputError, match="workspace, does not exist"):
        validate(demo_gguf, demo_gguf, english, llamacpp=llamacpp, workspace=workspace)
    workspace.mkdir()
    with pytest.raises(CalibrationError, match="too short"):
        validate(demo_gguf, demo_gguf, text, llamacpp=llamacpp, workspace=workspace)
    with pytest.raises(LlamaCppError, match=r"broken\.gguf"):
        validate(broken, demo_gguf, english, llamacpp=llamacpp, workspace=workspace, context=64, chunks=4)
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", Cache("q4_0", "f16")), ("llama", Cache("f16", "q4_0")), ("gemma3", Cache("iq4_nl", "q5_1"))],
)
def test_torch_rounds_keys_and_values_as_llamacpp_does(
    family: str, cache: Cache, llamacpp: LlamaCpp, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only about as much: the very same rounding moves perplexity the same way, though a code may flip."""
    shape = {"head_dim": 64, "query_pre_attn_scalar": 64} if family == "gemma3" else {"head_dim": 64}
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny", **shape)))
    file = llamacpp.convert(checkpoint.folder, tmp_path / "float.gguf", "f32")
    with Reference(
        file, english, llamacpp=llamacpp, workspace=tmp_path, context=64, chunks=16, cache=cache
    ) as reference:
        theirs = reference.compare(file)
    plan = Plan(GGUFFile(file), RowIndex(GGUFFile(file), ["blk.0.attn_k.weight"]))
    model = LazyModel(checkpoint)
    plan.claim(block_matrices(model.load_block(0), model.block_names[0]))
    recipe = Recipe(str(checkpoint.folder), "F32", method="rtn", kv_cache={"k": cache.k, "v": cache.v})
    order = streams._key_order(
        plan.targets(f"{model.block_names[0]}.self_attn.k_proj.weight"), rounded_cache(recipe, model)
    )
    assert order is not None and (order.tolist() == list(range(64))) == (family != "llama")
    monkeypatch.setattr(streams, "_key_order", lambda *_: order)  # `evaluate` has no file to ask
    *_, done = evaluate(recipe.model, recipe, Held(english, 64, 16), device="cpu")
    assert isinstance(done, Evaluated)
    ours = done.evaluation
    assert ours.perplexity is not None
    moved = math.log(ours.perplexity / ours.perplexity_reference)
    assert moved == pytest.approx(math.log(theirs.perplexity / theirs.perplexity_reference), abs=4e-3)
    assert ours.kl_divergence == pytest.approx(theirs.kl_divergence, rel=0.1)


def test_a_recipes_cache_is_measured_with(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """Unless the command line names another; and it changes what is rounded to."""
    recipe = Recipe(
        str(make("llama", tmp_path / "tiny", num_hidden_layers=1)), "Q4_0", calibration=str(english), samples=4,
        sequence_length=64, device="cpu", kv_cache={"v": "q4_0"},
    )  # fmt: skip

    def artifact(name: str, given: dict[str, str] | None, **changes: Any) -> Artifact:
        held = None if given is None else Held(english, 64, 4, given)
        *_, done = pipeline.run(replace(recipe, **changes), tmp_path / name, llamacpp=llamacpp, held=held)
        assert isinstance(done, Finished)
        return done.report.artifacts[0]

    def tensors(name: str, file: Artifact) -> dict[str, bytes]:
        opened = GGUFFile(tmp_path / name / file.path)
        return {each: opened.bytes(each).tobytes() for each in opened.tensors}

    first, second = artifact("first", {}), artifact("second", {"k": "q8_0", "v": "q8_0"})
    assert first.validation is not None and second.validation is not None
    assert (first.validation["cache_k"], first.validation["cache_v"]) == ("f16", "q4_0")
    assert (second.validation["cache_k"], second.validation["cache_v"]) == ("q8_0", "q8_0")
    assert tensors("first", first) == tensors("second", second)
    assert tensors("first", first) != tensors("third", artifact("third", None, kv_cache={}))


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1", "Q4_K", "BF16"])
def test_torch_rounds_inputs_as_llamacpp_does(format: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """Weights that the format can hold, so that a file's divergence is that of its kernels' rounding."""
    folder = make("llama", tmp_path / "tiny", hidden_size=256, intermediate_size=256, head_dim=64)
    checkpoint, fmt = open_checkpoint(str(folder)), FORMATS[format]
    held = {
        name: fmt.dequantize(fmt.quantize(weight)) if name.endswith("_proj.weight") else weight.clone()
        for name, weight in read_finite(checkpoint, checkpoint.tensors).items()
    }
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    original = llamacpp.convert(folder, tmp_path / "float.gguf", "f32")
    recipe = Recipe(str(folder), format, method="rtn", device="cpu", pure=True, embedding_type="F32", output_type="F32")
    if fmt.is_float:
        outside = ["--pure", "--output-tensor-type", "f32", "--token-embedding-type", "f32"]
        file = llamacpp.quantize(original, tmp_path / "rounded.gguf", format, options=outside)
    else:
        *_, done = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=None)
        assert isinstance(done, Finished)
        file = tmp_path / "out" / done.report.artifacts[0].path
    with Reference(original, english, llamacpp=llamacpp, workspace=tmp_path, context=64, chunks=16) as reference:
        theirs = reference.compare(file).kl_divergence

    def kl(activations: str) -> float:
        simulated = Recipe(recipe.model, format, method="rtn", activations=activations)
        *_, found = evaluate(recipe.model, simulated, Held(english, 64, 16), device="cpu")
        assert isinstance(found, Evaluated) and found.evaluation.kl_divergence is not None
        return found.evaluation.kl_divergence

    assert kl("llama.cpp") == pytest.approx(theirs, rel=0.15)
    assert kl("none") < 0.5 * theirs


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_torch_computes_llama_perplexity(family: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """`evaluate` follows the same protocol on the same tokens."""
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny")))
    file = llamacpp.convert(checkpoint.folder, tmp_path / "float.gguf", "f32")
    theirs = llamacpp.perplexity(file, english, context=64, chunks=8)
    *_, done = evaluate(str(checkpoint.folder), None, Held(english, 64, 8), device="cpu")
    assert isinstance(done, Evaluated)
    assert done.evaluation.perplexity_reference == pytest.approx(theirs.value, rel=3e-3)
    assert done.evaluation.perplexity_reference_error == pytest.approx(theirs.error, rel=1e-2)
