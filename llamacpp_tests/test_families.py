"""Tiny models of every family through the whole pipeline, and real llama.cpp's word on the files.

Upstream is the oracle throughout: its converter for keys, names and shapes, its `llama-quantize` for types and size,
its `llama-perplexity` for what a file computes. Against the last stands transformers, run on the values in the file.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from formats import FORMATS
from qronos_export import pipeline
from qronos_export.artifact.gguf import GGUFFile, Target
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.calibration import block_matrices
from qronos_export.checkpoint import load_whole, open_checkpoint, opening_token, tokenizer
from qronos_export.events import Finished
from qronos_export.llamacpp import LlamaCpp
from qronos_export.llamacpp_log import Perplexity, logits_bytes
from qronos_export.recipe import Recipe, recipe_from
from qronos_export.report import RunReport
from tests.families import FAMILIES, RELATIVES, make

CONTEXT, CHUNKS = 128, 2
GELU = ("gemma3", "starcoder2")
"""ggml reads this activation function from a table of fp16 numbers."""
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
"""llama.cpp's attention without rounding to fp16."""


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is quantized."""

    family: str
    format: str = "Q4_0"
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)


CASES = {family: Case(family) for family in (*FAMILIES, *RELATIVES)} | {
    "q8_0": Case("llama", format="Q8_0"),
    # More rows in the embedding than the tokenizer has tokens, stored in bf16.
    "padded_bf16": Case("llama", dtype=torch.bfloat16, config={"vocab_size": 1056}),
    # Rows of whole 256-blocks: llama.cpp makes the head, or what stands for it, Q6_K. Its ε is a number of float32.
    "q6_k_head": Case("llama", config={"hidden_size": 256, "num_hidden_layers": 1, "rms_norm_eps": 2.0**-17}),
    "q6_k_tied": Case("llama", config={"hidden_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Export:
    """A finished run, and upstream's two files from the same checkpoint."""

    case: Case
    checkpoint: Path
    recipe: Recipe
    report: RunReport
    ours: GGUFFile
    float: GGUFFile
    theirs: GGUFFile

    @property
    def quantized(self) -> list[str]:
        return [name for name, tensor in self.float.tensors.items() if tensor.type != self.ours.tensors[name].type]


@dataclass(frozen=True)
class Keeping(LlamaCpp):
    """Keeps a copy of what upstream's converter wrote: to compare with, it need not run again."""

    kept: Path = Path()

    def convert(self, checkpoint: Path, destination: Path, outtype: str) -> Path:
        shutil.copy(super().convert(checkpoint, destination, outtype), self.kept)
        return destination


def run(recipe: Recipe, output: Path, llamacpp: LlamaCpp) -> tuple[RunReport, Path]:
    *_, finished = pipeline.run(recipe, output, llamacpp=llamacpp, held=None)
    assert isinstance(finished, Finished)
    (artifact,) = finished.report.artifacts
    assert sorted(path.name for path in output.iterdir()) == sorted([artifact.path, "report.json"])
    return finished.report, output / artifact.path


Exports = Callable[[str], Export]


@pytest.fixture(scope="module")
def exports(llamacpp: LlamaCpp, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The export of a case of CASES, run once."""

    @functools.cache
    def export(name: str) -> Export:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        checkpoint = make(case.family, folder / "tiny", dtype=case.dtype, **case.config)
        recipe = Recipe(
            str(checkpoint), format=case.format, transforms="none", calibration=str(english), samples=8,
            sequence_length=64, device="cpu",
        )  # fmt: skip
        original = folder / "float.gguf"
        report, ours = run(recipe, folder / "ours", Keeping(**vars(llamacpp), kept=original))
        theirs = llamacpp.quantize(original, folder / "theirs.gguf", case.format)
        return Export(case, checkpoint, recipe, report, GGUFFile(ours), GGUFFile(original), GGUFFile(theirs))

    return export


@pytest.fixture(scope="module", params=CASES)
def export(exports: Exports, request: pytest.FixtureRequest) -> Export:
    return exports(request.param)


# ---- the file is upstream's but for the blocks


def test_metadata_names_and_shapes_are_upstreams(export: Export) -> None:
    ours, float_file, theirs = (metadata(file) for file in (export.ours, export.float, export.theirs))
    typed = {"general.file_type", "general.quantization_version"}
    own = {key for key in ours if key.startswith("qronos_export.")}
    assert own and {key: ours[key] for key in ours.keys() - typed - own} == {
        key: float_file[key] for key in float_file.keys() - typed
    }
    assert {key: ours[key] for key in typed} == {key: theirs[key] for key in typed}
    assert [(t.name, t.shape) for t in export.ours.tensors.values()] == [
        (t.name, t.shape) for t in export.float.tensors.values()
    ]


def test_types_and_size_are_those_of_llama_quantize(export: Export) -> None:
    assert {t.name: t.type for t in export.ours.tensors.values()} == {
        t.name: t.type for t in export.theirs.tensors.values()
    }
    assert data_bytes(export.ours) == data_bytes(export.theirs)


def test_nothing_meant_to_be_quantized_stayed_float(export: Export) -> None:
    assert export.report.kept == []
    assert {layer.tensor for layer in export.report.layers} == set(export.quantized)
    assert {layer.tensor for layer in export.report.layers if layer.method == "rtn"} == {"token_embd.weight"}


def test_what_stayed_float_is_untouched(export: Export) -> None:
    for name in export.ours.tensors.keys() - set(export.quantized):
        assert np.array_equal(export.ours.bytes(name), export.float.bytes(name)), name


def test_rows_of_whole_256_blocks_make_the_head_q6_k(exports: Exports) -> None:
    assert exports("q6_k_head").ours.tensors["output.weight"].type == "Q6_K"
    assert exports("q6_k_tied").ours.tensors["token_embd.weight"].type == "Q6_K"
    assert exports("llama").ours.tensors["output.weight"].type != "Q6_K"


def test_the_padded_vocabulary_is_in_the_file(exports: Exports) -> None:
    padded = exports("padded_bf16")
    assert len(tokenizer(open_checkpoint(str(padded.checkpoint)))) == 1024
    assert len(metadata(padded.ours)["tokenizer.ggml.tokens"]) == 1056
    assert padded.ours.tensors["token_embd.weight"].rows == 1056


def test_the_float_file_has_the_checkpoints_own_type(export: Export) -> None:
    wanted = {torch.float32: {"F32"}, torch.bfloat16: {"BF16"}}[export.case.dtype]
    assert {export.float.tensors[name].type for name in export.quantized} == wanted


def data_bytes(file: GGUFFile) -> int:
    """All that comes after the metadata, in which ours says more than llama-quantize's."""
    return file.path.stat().st_size - file.reader.data_offset


def metadata(file: GGUFFile) -> dict[str, Any]:
    """Every key of the file with its value; those that begin with GGUF. describe the header."""
    return {key: field.contents() for key, field in file.reader.fields.items() if not key.startswith("GGUF.")}


# ---- llama.cpp computes from the file what transformers computes from its values


@dataclass(frozen=True)
class Scores:
    """What `llama-perplexity --kl-divergence-base` keeps of a run."""

    tokens: Tensor  # int64 [chunks, context]
    log_probabilities: Tensor  # float32 [chunks, scored, vocabulary]; nothing below the largest one − 16


def read_scores(path: Path) -> Scores:
    """The layout is in the docstring of `logits_bytes`."""
    data = path.read_bytes()
    context, vocabulary, chunks = np.frombuffer(data, "<u4", 3, offset=8).tolist()
    assert data[:8] == b"_logits_" and len(data) == logits_bytes(vocabulary, context, chunks)
    tokens = np.frombuffer(data, "<i4", chunks * context, offset=20).reshape(chunks, context)
    padded = vocabulary + vocabulary % 2
    row = np.dtype([("scale", "<f4"), ("minimum", "<f4"), ("codes", "<u2", padded)])
    rows = np.frombuffer(data, row, offset=20 + tokens.nbytes).reshape(chunks, -1)
    values = rows["minimum"][..., None] + rows["scale"][..., None] * rows["codes"][..., :vocabulary].astype(np.float32)
    return Scores(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(values))


@dataclass(frozen=True)
class Measured:
    """llama.cpp's run of a file: exactly, from its values as F32, and as the file is."""

    scores: Scores
    exact: Perplexity
    file: Perplexity


@pytest.fixture(scope="module")
def measured(
    exports: Exports, llamacpp: LlamaCpp, english: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Measured]:
    @functools.cache
    def measure(name: str) -> Measured:
        return measure_file(exports(name).ours.path, llamacpp, english, tmp_path_factory.mktemp(f"{name}-measured"))

    return measure


def measure_file(ours: Path, llamacpp: LlamaCpp, english: Path, folder: Path) -> Measured:
    text = folder / "held.txt"
    text.write_text(english.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    widened = llamacpp.quantize(ours, folder / "widened.gguf", "F32", options=["--allow-requantize"])
    exact = llamacpp.perplexity(widened, text, context=CONTEXT, chunks=CHUNKS, logits=folder / "scores", options=EXACT)
    file = llamacpp.perplexity(ours, text, context=CONTEXT, chunks=CHUNKS)
    return Measured(read_scores(folder / "scores"), exact, file)


def file_targets(export: Export, model: PreTrainedModel) -> list[Target]:
    return RowIndex(export.float, export.quantized).match(weights(model))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every matrix of the model; the embedding comes first, so that it and not a tied head is matched."""
    return {"embedding": model.get_input_embeddings().weight.detach(), **block_matrices(model, "model")}


def put_back(export: Export, model: PreTrainedModel, targets: list[Target]) -> None:
    """Write the values of the file's bytes into `model`."""
    places = weights(model)
    for target in targets:
        stored = export.ours.tensors[target.tensor]
        values = FORMATS[stored.type].dequantize(torch.from_numpy(export.ours.bytes(target.tensor)))
        if (beside := target.tensor.replace(".weight", ".scale")) in export.ours.tensors:
            values *= torch.cat(list(export.ours.floats(beside))).flatten()[stored.expert(torch.arange(stored.rows))][
                :, None
            ]
        places[target.source][target.rows] = values[target.file_rows]


def largest_difference(export: Export, model: PreTrainedModel, scores: Scores) -> float:
    expected = log_probabilities(export, model, scores.tokens)
    floor = expected.amax(-1, keepdim=True) - 16
    return float((expected.clamp(min=floor) - scores.log_probabilities).abs().max())


@torch.no_grad()
def log_probabilities(export: Export, model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of the tokens llama-perplexity scores: the second half of every chunk, the very first of its context left out."""
    opening = opening_token(tokenizer(open_checkpoint(str(export.checkpoint))))
    seen = tokens.clone()
    if opening is not None:
        seen[:, 0] = opening
    return model(seen).logits[:, CONTEXT // 2 : -1].log_softmax(-1)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantized_torch_model(
    name: str, exports: Exports, measured: Callable[[str], Measured]
) -> None:
    export, run = exports(name), measured(name)
    model = load_whole(open_checkpoint(str(export.checkpoint)))
    targets = file_targets(export, model)
    assert {target.tensor for target in targets} == set(export.quantized)
    put_back(export, model, targets)
    # The scores are kept in 16 bits over 16 nats: half a step is 1.2e-4.
    gelu = export.case.family in GELU
    assert largest_difference(export, model, run.scores) < (6e-3 if gelu else 3e-4)
    expected = log_probabilities(export, model, run.scores.tokens)
    scored = run.scores.tokens[:, CONTEXT // 2 + 1 :]
    perplexity = float((-expected.gather(-1, scored[..., None])).mean().exp())
    assert run.exact.value == pytest.approx(perplexity, rel=5e-4 if gelu else 5e-5)
    # As it is, the file runs on activations of 8 bits: up to 1.1 % was seen on these random, very unsure models.
    assert run.file.value == pytest.approx(perplexity, rel=0.03)


def test_the_comparison_has_teeth(exports: Exports, measured: Callable[[str], Measured]) -> None:
    """Two rows of one tensor in the wrong place, and the logits no longer agree."""
    export, run = exports("llama"), measured("llama")
    model = load_whole(open_checkpoint(str(export.checkpoint)))
    targets = file_targets(export, model)
    place = next(index for index, target in enumerate(targets) if target.tensor == "blk.0.attn_q.weight")
    rows = targets[place].rows.clone()
    rows[[0, 1]] = rows[[1, 0]]
    targets[place] = replace(targets[place], rows=rows)
    put_back(export, model, targets)
    assert largest_difference(export, model, run.scores) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_llamacpp_multiplies_with_the_scales_beside_nvfp4(
    family: str, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """Scales are there where llama.cpp's graph of the family has them, and nowhere else."""
    wide = {each: {"hidden_size": 256} for each in ("llama", "llama_tied", "qwen3", "gemma3", "mixtral")}
    sizes = {"qwen3_moe": {"moe_intermediate_size": 128}, **wide}.get(family, {})
    checkpoint = make(family, tmp_path / "tiny", intermediate_size=256, **sizes)
    original = tmp_path / "float.gguf"
    recipe = Recipe(
        str(checkpoint), "NVFP4", transforms="none", calibration=str(english), samples=8, sequence_length=64,
        device="cpu",
    )  # fmt: skip
    report, file = run(recipe, tmp_path / "ours", Keeping(**vars(llamacpp), kept=original))
    ours = GGUFFile(file)
    export = Export(Case(family), checkpoint, recipe, report, ours, GGUFFile(original), ours)
    scales = [ours.tensors[name].shape for name in ours.tensors if name.endswith(".scale")]
    assert bool(scales) == (family in ("llama", "llama_tied", "mixtral", "qwen3", "qwen3_moe"))
    assert ((4,) in scales) == (family in ("mixtral", "qwen3_moe"))
    assert any("no scale for it" in layer.note for layer in report.layers) == (not scales)
    run_of_file = measure_file(file, llamacpp, english, tmp_path)
    model = load_whole(open_checkpoint(str(checkpoint)))
    put_back(export, model, file_targets(export, model))
    assert largest_difference(export, model, run_of_file.scores) < (6e-3 if family in GELU else 3e-4)


# ---- recipes, experts, float files


def test_a_reports_recipe_gives_the_same_bytes(exports: Exports, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    export = exports("qwen3_moe")
    again, _ = run(recipe_from(export.report.to_json()["recipe"], "report.json"), tmp_path / "again", llamacpp)
    assert again.artifacts == export.report.artifacts


def test_batching_hardly_matters(exports: Exports, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """Sums of another order round a weight here and there the other way; then the rest of its row differs, and all that
    reads its output. So equal bytes are asked of the first group only, and of the others equally small errors. (Where
    rows are coupled, the later rows of the head differ, too.)"""
    recipe = replace(exports("llama").recipe, attention_aware=False)
    runs = [
        run(replace(recipe, micro_batch=batch), tmp_path / str(batch), llamacpp) for batch in (recipe.micro_batch, 1)
    ]
    (report, file), (other_report, other_file) = runs
    ours, other = GGUFFile(file), GGUFFile(other_file)
    assert np.array_equal(ours.bytes("token_embd.weight"), other.bytes("token_embd.weight"))
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        assert (ours.bytes(name) == other.bytes(name)).mean() > 0.98, name  # 0.998 was seen
    errors, others = (np.array([layer.error for layer in each.layers]) for each in (report, other_report))
    assert np.all(np.abs(np.log(others / errors)) < 0.25)  # 11 % was seen
    assert abs(np.log(others / errors).mean()) < 0.03


def test_experts_that_saw_few_tokens_are_named(exports: Exports, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """Of 192 inputs: others' tokens help where there are any; a twelfth is too little."""
    for length, method, help in ((16, "qronos", "of other experts make up"), (5, "rtn", "rounded to nearest")):
        recipe = replace(exports("mixtral").recipe, samples=1, sequence_length=length)
        report, _ = run(recipe, tmp_path / method, llamacpp)
        down = [layer for layer in report.layers if "down_proj" in layer.name and layer.tokens]
        assert down and all(layer.method == method and help in layer.note for layer in down)
        assert all("saw only" in layer.note and layer.tokens <= length for layer in down)
        assert any(layer.method == "qronos" for layer in report.layers)


def test_a_float_gguf_gives_the_same_file(
    exports: Exports, llamacpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, where GGUF's float32 holds every hyperparameter as config.json does."""
    export = exports("q6_k_head")
    monkeypatch.setenv("QRONOS_EXPORT_CACHE", str(tmp_path / "cache"))
    report, _ = run(replace(export.recipe, model=str(export.float.path)), tmp_path / "from-gguf", llamacpp)
    assert report.artifacts[0].sha256 == export.report.artifacts[0].sha256
