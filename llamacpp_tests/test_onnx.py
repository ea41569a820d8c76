"""ONNX models of whole runs in onnxruntime and onnxruntime-genai, against torch on the values that the GGUF file holds.

Hidden sizes of 256 let mixes of super-blocks through, so that a fused q, k, v is of two types.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from qronos_export import pipeline
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.onnx_rows import find_vectors
from qronos_export.artifact.onnx_session import Session, find_model
from qronos_export.checkpoint import load_whole, open_checkpoint, tokenizer, unpack
from qronos_export.cli import app
from qronos_export.conversion import convert
from qronos_export.corpus import held_out_text, held_out_tokens
from qronos_export.errors import ArtifactError, CheckpointError, GateError, UsageError
from qronos_export.events import Finished
from qronos_export.llamacpp import LlamaCpp
from qronos_export.onnx_export import float_graph
from qronos_export.onnx_validation import TorchReference, open_session
from qronos_export.recipe import Recipe
from tests.families import make

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TOKENS = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
LAYOUTS = ("onnx", "onnx-plain")


@dataclass(frozen=True)
class Case:
    family: str
    format: str
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama", "Q4_K_M", WIDE),
    "tied": Case("llama_tied", "Q2_K", WIDE),
    "qwen2": Case("qwen2", "Q4_0"),  # with biases
    "qwen3": Case("qwen3", "Q4_1"),  # tied, with norms of q and k
    "phi3": Case("phi3", "MXFP4"),  # fused in the checkpoint and in the file, apart in the graph
}


@dataclass(frozen=True)
class Done:
    checkpoint: Path
    folder: Path
    gguf: Path
    model: PreTrainedModel
    """In torch, with the file's values."""

    def layout(self, name: str) -> Path:
        return self.gguf.with_name(f"{self.gguf.stem}-{name}")


Runs = Callable[[str], Done]


@pytest.fixture(scope="module")
def runs(llamacpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    @functools.cache
    def run(name: str) -> Done:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        checkpoint = make(case.family, folder / "tiny", **case.config)
        recipe = Recipe(str(checkpoint), case.format, artifact="gguf,onnx,onnx-plain", accuracy_level=0, method="rtn")
        *_, _ = pipeline.run(recipe, folder / "out", llamacpp=llamacpp, held=None)
        gguf = folder / "out" / f"tiny-{case.format}.gguf"
        unpack(gguf, folder / "values", checkpoint)
        return Done(checkpoint, folder / "out", gguf, load_whole(open_checkpoint(str(folder / "values"))))

    return run


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, attention_mask=mask).logits.float()


def close(found: Tensor, expected: Tensor) -> None:
    """Both are float32 sums of the same products in other orders, through a few layers."""
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_torch_does_with_the_values_of_the_gguf(runs: Runs, name: str, layout: str) -> None:
    done = runs(name)
    close(Session(find_model(done.layout(layout))).logits(TOKENS), logits(done.model, TOKENS))


def stepwise(path: Path, tokens: Tensor, mask: Tensor, heads: int, size: int) -> Tensor:
    """Logits of `tokens`, the first half at once and then one by one, keys and values handed on."""
    options = SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = InferenceSession(path, options, ["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs() if each.name.startswith("past")]
    past = {each: np.zeros((len(tokens), heads, 0, size), np.float32) for each in names}
    outputs = [each.name for each in session.get_outputs()]
    half = tokens.shape[1] // 2
    found = []
    for first, last in [(0, half), *((n, n + 1) for n in range(half, tokens.shape[1]))]:
        feed = {"input_ids": tokens[:, first:last].numpy(), "attention_mask": mask[:, :last].numpy(), **past}
        answer = dict(zip(outputs, session.run(None, feed), strict=True))
        found.append(torch.from_numpy(answer["logits"]))
        past = {each: answer[each.replace("past_key_values", "present")] for each in names}
    return torch.cat(found, dim=1)


def test_plain_decoders_keep_keys_and_values_and_take_padding(runs: Runs) -> None:
    done = runs("qwen3")
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    config = done.model.config
    path = find_model(done.layout("onnx-plain"))
    found = stepwise(path, TOKENS, mask, config.num_key_value_heads, config.head_dim)
    close(found[0], logits(done.model, TOKENS[:1])[0])
    close(found[1, 5:], logits(done.model, TOKENS[1:, 5:])[0])


def test_plain_models_are_standard_and_say_their_opset(runs: Runs) -> None:
    opsets = {}
    for name in CASES:
        path = find_model(runs(name).layout("onnx-plain"))
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        opsets[name] = [(each.domain, each.version) for each in model.opset_import]
    assert opsets == {name: [("", 25 if name == "tied" else 21)] for name in CASES}  # Q2_K has codes of 2 bits


def test_the_standards_own_evaluator_runs_microscaling_decoders(runs: Runs, tmp_path: Path) -> None:
    """With weights in FLOAT4E2M1 and FLOAT8E8M0, which no runtime here computes with."""
    done = runs("phi3")
    *_, (written, notes) = convert(done.gguf, tmp_path, ["onnx-mx"], like=str(done.checkpoint))
    assert "MXFP4 is kept in ONNX's own type, which onnxruntime does not run on CPUs yet" in notes
    path = tmp_path / written.path / "model.onnx"
    with pytest.raises(ArtifactError, match=r"cannot run .*, of opset ai\.onnx 24 and IR"):
        Session(path)
    config = done.model.config
    heads, size = config.num_key_value_heads, config.head_dim
    feed = {"input_ids": TOKENS.numpy(), "attention_mask": np.ones_like(TOKENS.numpy())}
    evaluator = ReferenceEvaluator(str(path))
    feed |= {
        n: np.zeros((len(TOKENS), heads, 0, size), np.float32) for n in evaluator.input_names if n.startswith("past")
    }
    close(torch.from_numpy(evaluator.run(["logits"], feed)[0]), logits(done.model, TOKENS))


def greedy(model: PreTrainedModel, tokens: Tensor) -> list[int]:
    """With 32 tokens more, each the likeliest."""
    for _ in range(32):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return cast(list[int], tokens[0].tolist())


def generated(folder: Path, tokens: Tensor) -> list[int]:
    """The same by onnxruntime-genai."""
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = tokens.shape[1] + 32
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(tokens.numpy().astype(np.int32))
    for _ in range(32):
        generator.generate_next_token()
    return cast(list[int], generator.get_sequence(0).tolist())


def test_onnxruntime_genai_says_what_torch_says(runs: Runs) -> None:
    done = runs("llama")
    assert generated(done.layout("onnx"), TOKENS[:1, :8]) == greedy(done.model, TOKENS[:1, :8])


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral"},  # the builder forgets the windows
        {"model_type": "gemma2", "query_pre_attn_scalar": 32, "tie_word_embeddings": True},  # of every second layer
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1},
    ],
    ids=lambda config: config["model_type"],
)
def test_windows_are_those_of_the_model(config: dict[str, Any], tmp_path: Path) -> None:
    """Eight tokens wide; prefill and single steps."""
    checkpoint = open_checkpoint(str(make("llama", tmp_path / "tiny", sliding_window=8, **config)))
    model = load_whole(checkpoint)
    graph = float_graph(checkpoint, tmp_path / "graph")
    close(Session(graph).logits(TOKENS), logits(model, TOKENS))
    assert float((logits(model, TOKENS)[:, -1] - logits(model, TOKENS[:, -16:])[:, -1]).abs().max()) > 0
    config = model.config
    steps = stepwise(graph, TOKENS, torch.ones_like(TOKENS), config.num_key_value_heads, config.head_dim)
    close(steps, logits(model, TOKENS))
    assert generated(graph.parent, TOKENS[:1, :12]) == greedy(model, TOKENS[:1, :12])


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_model_that_the_builder_gets_wrong_is_refused(kind: str, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    positions = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    checkpoint = make("llama", tmp_path / "tiny", rope_parameters=positions)
    recipe = Recipe(str(checkpoint), "Q4_0", artifact="gguf,onnx", method="rtn")
    with pytest.raises(ArtifactError, match=r"makes another model of tiny: its logits are off by .*rope_scaling"):
        list(pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=None))
    assert not (tmp_path / "out").exists()


def products(path: Path) -> list[dict[str, int]]:
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return [{each.name: each.i for each in node.attribute} for node in nodes]


def test_rows_of_two_types_in_one_matrix_are_two_products(runs: Runs) -> None:
    """Q4_K_M gives v of half the layers Q6_K: 128 rows of 8-bit codes beside 384 of 4-bit ones of q and k."""
    found = {
        (each["bits"], each["block_size"], each["N"]) for each in products(find_model(runs("llama").layout("onnx")))
    }
    assert {(4, 32, 384), (8, 16, 128)} <= found


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_converting_the_gguf_gives_the_very_bytes_of_the_run(runs: Runs, name: str, tmp_path: Path) -> None:
    done = runs(name)
    before = {path.name: path.read_bytes() for path in done.layout("onnx").glob("model.onnx*")}
    *_, (written, _) = convert(done.gguf, tmp_path / "out", ["onnx"], accuracy_level=0, like=str(done.checkpoint))
    folder = tmp_path / "out" / written.path
    assert {path.name: path.read_bytes() for path in folder.glob("model.onnx*")} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [written.path]


def test_a_stray_gguf_needs_nothing_beside_it(runs: Runs, tmp_path: Path) -> None:
    """Configuration and tokenizer as transformers reads them out of the file; for transformers.js, too."""
    done = runs("llama")
    *_, _ = convert(done.gguf, tmp_path, ["onnx", "onnx-js"], accuracy_level=0)
    for layout in ("onnx", "onnx-js"):
        found = Session(find_model(tmp_path / done.layout(layout).name)).logits(TOKENS)
        close(found, logits(done.model, TOKENS))
    folder = tmp_path / done.layout("onnx-js").name
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "onnx",
    }
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model_q4.onnx", "model_q4.onnx_data"]
    settings = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert settings == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}


def test_validation_is_llama_perplexitys_protocol(runs: Runs, tmp_path: Path) -> None:
    done = runs("tied")
    text = tmp_path / "text"
    text.write_text(held_out_text()[:20_000])
    checkpoint = open_checkpoint(str(done.checkpoint))
    reference = TorchReference(checkpoint, text, device=torch.device("cpu"), context=64, chunks=4)
    found = reference.compare(open_session(done.layout("onnx")))
    tokens = held_out_tokens(text, checkpoint, 64, 4)
    p, q = (F.log_softmax(logits(m, tokens)[:, 32:-1], -1).flatten(0, 1) for m in (load_whole(checkpoint), done.model))
    target = tokens[:, 33:].flatten()
    assert found.perplexity_reference == pytest.approx(float(F.nll_loss(p, target).exp()), rel=1e-4)
    assert found.perplexity == pytest.approx(float(F.nll_loss(q, target).exp()), rel=1e-4)
    assert found.kl_divergence == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-3)
    assert found.same_top == pytest.approx(100 * float((p.argmax(1) == q.argmax(1)).float().mean()), abs=1.0)
    assert (found.chunks, found.context, found.llama_cpp) == (4, 64, None)
    assert found.runtime.startswith("onnxruntime 1.")


def test_the_gate_holds_for_onnx(runs: Runs, tmp_path: Path) -> None:
    done = runs("tied")
    text = tmp_path / "text"
    text.write_text(held_out_text()[:20_000])
    arguments = ["validate", done.layout("onnx"), "--reference", done.checkpoint, "--text", text, "--context", 64]
    arguments += ["--chunks", 2, "--json", "--max-kld"]
    passed, missed = (CliRunner().invoke(app, [*map(str, arguments), limit]) for limit in ("9", "0.001"))
    assert (passed.exit_code, json.loads(passed.stdout)["passed"]) == (0, True)
    assert isinstance(missed.exception, GateError) and json.loads(missed.stdout)["passed"] is False


def test_integer_grids_need_no_gguf(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    """A scale for 64 columns, or for a whole row of 64, 128 or 192, which is then written for each 64 or 128."""
    checkpoint = make("llama", tmp_path / "tiny")
    recipe = Recipe(str(checkpoint), "INT8_G64,UINT4", artifact="onnx", accuracy_level=0, method="rtn")
    *_, _ = pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=None)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "tiny-INT8_G64-onnx", "tiny-UINT4-onnx"}
    expected = logits(load_whole(open_checkpoint(str(checkpoint))), TOKENS)
    for format, kinds, error in (("INT8_G64", {(8, 64)}, 0.04), ("UINT4", {(4, 64), (4, 128)}, 0.4)):
        path = find_model(tmp_path / "out" / f"tiny-{format}-onnx")
        assert {(each["bits"], each["block_size"]) for each in products(path)} == kinds | {(8, 32)}  # Q8_0, the head
        assert float((Session(path).logits(TOKENS) - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        (
            "mixtral",
            {},
            r"model builder cannot make MixtralForCausalLM into ONNX \(NotImplementedError: .*--artifact gguf",
        ),
        ("llama", {"format": "INT4_G64", "artifact": "gguf,onnx"}, "INT4_G64 is no type of GGUF; use --artifact onnx"),
        ("llama", {"format": "MXFP8_E5M2", "artifact": "gguf"}, "MXFP8_E5M2 is no type of GGUF; use .* onnx-mx"),
        ("llama", {"format": "MXFP6_E3M2", "artifact": "gguf"}, "MXFP6_E3M2 is no type of GGUF; use another type"),
        ("llama", {"format": "INT4_G24"}, "INT4_G24: no integers of ONNX hold it exactly; choose another type"),
        (
            "llama",
            {"format": "MXFP8_E4M3"},
            "MXFP8_E4M3: no integers of ONNX hold it exactly; only --artifact onnx-mx can",
        ),
        ("llama", {"format": "INT4_G64", "method": "gptq", "activations": "llama.cpp"}, "no kernel for INT4_G64"),
        ("llama", {"kv_cache": {"k": "q8_0"}, "method": "gptq"}, "kv_cache rounds keys and values as llama.cpp does"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    family: str, settings: dict[str, Any], says: str, llamacpp: LlamaCpp, tmp_path: Path
) -> None:
    checkpoint = make(family, tmp_path / "tiny")
    recipe = Recipe(**{"model": str(checkpoint), "artifact": "onnx", "method": "rtn", **settings})
    with pytest.raises(UsageError, match=says):
        list(pipeline.run(recipe, tmp_path / "out", llamacpp=llamacpp, held=None))
    assert not (tmp_path / "out").exists()


def test_conversions_that_cannot_be(runs: Runs, tmp_path: Path) -> None:
    gguf = runs("phi3").gguf
    with pytest.raises(UsageError, match="--artifact is 'tflite'; expected onnx, onnx-js"):
        list(convert(gguf, tmp_path, ["tflite"]))
    with pytest.raises(UsageError, match="--artifact is 'onnx,onnx'; expected each once"):
        list(convert(gguf, tmp_path, ["onnx", "onnx"]))
    with pytest.raises(UsageError, match=r"absent\.gguf does not exist"):
        list(convert(tmp_path / "absent.gguf", tmp_path, ["onnx"]))
    with pytest.raises(UsageError, match=r"phi3\.rope\.scaling\.original_context_length, which .* by --like"):
        list(convert(gguf, tmp_path, ["onnx"]))
    broken, blocks = tmp_path / "broken.gguf", GGUFFile(runs("llama").gguf).bytes("blk.0.attn_q.weight").tobytes()
    broken.write_bytes(runs("llama").gguf.read_bytes().replace(blocks, b"\x00\x7e" + blocks[2:], 1))  # a NaN for d
    with pytest.raises(CheckpointError, match=r"broken\.gguf cannot be converted.*q_proj.* holds NaN"):
        list(convert(broken, tmp_path / "out", ["onnx"]))
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(runs("llama").gguf.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0other", 1))
    with pytest.raises(CheckpointError, match="Or name a MODEL of the same configuration and tokenizer by --like"):
        list(convert(odd, tmp_path / "out", ["onnx"]))
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_graph_lacks_is_named(runs: Runs) -> None:
    file = GGUFFile(runs("qwen2").gguf)
    names = [name for name, tensor in file.tensors.items() if len(tensor.shape) == 1]
    vectors = {name: torch.cat(list(file.floats(name))).flatten() for name in names}
    find_vectors(file, [torch.cat(list(vectors.values()))])
    without = [values for name, values in vectors.items() if name != "blk.1.attn_k.bias"]
    with pytest.raises(ArtifactError, match=r"blk\.1\.attn_k\.bias of .* is nowhere in the ONNX graph.*--like"):
        find_vectors(file, without)


def test_smollm2_in_all_runtimes(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """In floats as in torch, on a text and greedily; with inputs of eight bits, llama.cpp's perplexity."""
    recipe = Recipe("demo", "Q4_0", artifact="gguf,onnx", accuracy_level=0, method="rtn")
    *_, finished = pipeline.run(recipe, tmp_path, llamacpp=llamacpp, held=None)
    assert isinstance(finished, Finished)
    gguf, folder = (tmp_path / artifact.path for artifact in finished.report.artifacts)
    unpack(gguf, tmp_path / "values", open_checkpoint("demo").folder)
    checkpoint = open_checkpoint(str(tmp_path / "values"))
    prompt = torch.tensor([tokenizer(checkpoint)("The capital of France is")["input_ids"]])
    assert generated(folder, prompt) == greedy(load_whole(checkpoint), prompt)
    reference = TorchReference(checkpoint, english, device=torch.device("cpu"), context=256, chunks=4)
    assert abs(reference.compare(open_session(folder)).kl_divergence) < 1e-6
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    levels = [each for node in model.graph.node for each in node.attribute if each.name == "accuracy_level"]
    for level in levels:
        level.i = 4
    onnx.save(model, folder / "model.onnx")
    expected = llamacpp.perplexity(gguf, english, context=256, chunks=4).value
    assert reference.compare(open_session(folder)).perplexity == pytest.approx(expected, rel=0.005)
