"""Types, mixes and the user's wishes: which tensor becomes what, held against llama-quantize on real tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qronos_export import pipeline
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.errors import PlanError, UsageError
from qronos_export.events import Finished
from qronos_export.llamacpp import LlamaCpp
from qronos_export.plan import CARRIERS
from qronos_export.recipe import Recipe
from qronos_export.report import RunReport
from tests.families import make

MIXES = (
    "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "MXFP4_MOE", "Q4_K",
)  # fmt: skip

MODELS = {
    "whole": ("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}),
    "tied": ("llama", {"hidden_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "narrow": ("llama", {}),  # rows of 64 and 128: 256 divides none of them
    "experts": ("mixtral", {"hidden_size": 256}),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, config = MODELS[request.param]
    return make(family, tmp_path_factory.mktemp(request.param) / "tiny", **config)


def run(recipe: Recipe, output: Path, llamacpp: LlamaCpp) -> tuple[RunReport, dict[str, GGUFFile]]:
    """The report, and each file by its format."""
    *_, finished = pipeline.run(recipe, output, llamacpp=llamacpp, held=None)
    assert isinstance(finished, Finished)
    return finished.report, {a.format: GGUFFile(output / a.path) for a in finished.report.artifacts}


def data_bytes(file: GGUFFile) -> int:
    """All that comes after the metadata, in which ours says more than llama-quantize's."""
    return file.path.stat().st_size - file.reader.data_offset


def types(file: GGUFFile) -> dict[str, str]:
    """Of all tensors but the scales that NVFP4 may have beside it."""
    return {tensor.name: tensor.type for tensor in file.tensors.values() if not tensor.name.endswith(".scale")}


def test_every_mix_is_llama_quantizes_to_the_byte(
    checkpoint: Path, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    """Types, sizes, file type and the values that llama.cpp itself reads out of the file."""
    original = llamacpp.convert(checkpoint, tmp_path / "float.gguf", "f32")
    report, ours = run(Recipe(str(checkpoint), ",".join(MIXES), method="rtn"), tmp_path / "out", llamacpp)
    assert list(ours) == list(MIXES)
    for name, file in ours.items():
        carrier, _ = CARRIERS.get(name, (name, None))
        # What upstream has no mix of is asked for tensor by tensor.
        wanted = {f"^{t}$": kind.lower() for t, kind in types(file).items() if kind == name} if name in CARRIERS else {}
        imatrix = None
        if name == "Q2_K_S":  # refused without one; it leaves four keys in the file
            imatrix = llamacpp.imatrix(original, english, tmp_path / "imatrix.gguf", context=64, chunks=8)
        theirs = GGUFFile(
            llamacpp.quantize(original, tmp_path / "theirs.gguf", carrier, tensor_types=wanted, imatrix=imatrix)
        )
        assert types(file) == types(theirs), name
        if imatrix or len(types(file)) < len(file.tensors):  # an imatrix leaves keys in the header, NVFP4 has scales
            sizes = [
                {t.name: t.nbytes for t in each.tensors.values() if t.name in types(each)} for each in (file, theirs)
            ]
            assert sizes[0] == sizes[1], name
        else:
            assert data_bytes(file) == data_bytes(theirs), name
        if name not in CARRIERS:
            key = "general.file_type"
            assert file.reader.fields[key].contents() == theirs.reader.fields[key].contents(), name
        read = GGUFFile(llamacpp.quantize(file.path, tmp_path / "read.gguf", "F32", options=["--allow-requantize"]))
        for tensor in types(file):
            for stored, said in zip(file.floats(tensor), read.floats(tensor), strict=True):
                assert torch.equal(stored, said), (name, tensor)
        substitutes = {s["tensor"]: s["type"] for s in report.substitutes if s["artifact"] == name}
        assert all(types(file)[tensor] == kind for tensor, kind in substitutes.items())


def test_llamacpp_runs_every_type(llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """On its kernels for the type, which round activations, nearly the perplexity of the same values in float32."""
    family, config = MODELS["whole"]
    checkpoint = make(family, tmp_path / "tiny", **config)
    mixes = ["Q1_0", "Q2_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]
    mixes += ["MXFP4", "NVFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    _, ours = run(Recipe(str(checkpoint), ",".join(mixes), method="rtn"), tmp_path / "out", llamacpp)
    for name, file in ours.items():
        read = llamacpp.quantize(file.path, tmp_path / "read.gguf", "F32", options=["--allow-requantize"])
        found, expected = (llamacpp.perplexity(each, english, context=64, chunks=4) for each in (file.path, read))
        assert found.value == pytest.approx(expected.value, rel=0.05), name


def test_substitutes_are_reported(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    narrow = make("llama", tmp_path / "narrow")
    report, _ = run(Recipe(str(narrow), "Q4_K_M,Q4_0", method="rtn"), tmp_path / "out", llamacpp)
    found = {(s["artifact"], s["wanted"], s["type"]) for s in report.substitutes}
    assert ("Q4_K_M", "Q4_K", "Q5_0") in found and ("Q4_K_M", "Q6_K", "Q8_0") in found
    assert not any(s["tensor"] == "blk.0.attn_q.weight" for s in report.substitutes if s["artifact"] == "Q4_0")


def test_wishes_go_where_llama_quantize_puts_them(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    checkpoint = make("llama", tmp_path / "tiny", hidden_size=256, num_hidden_layers=2)
    original = llamacpp.convert(checkpoint, tmp_path / "float.gguf", "f32")
    wishes = {"blk.1.attn_?.weight": "Q6_K", "blk.*.attn_q.weight": "Q8_0", "blk.*.ffn_down.weight": "f16"}
    recipe = Recipe(
        str(checkpoint), "Q4_K_M,NVFP4", method="rtn", overrides=wishes, output_type="Q8_0", embedding_type="Q5_K"
    )
    _, ours = run(recipe, tmp_path / "out", llamacpp)
    for file in ours.values():
        chosen = types(file)
        assert chosen["blk.1.attn_q.weight"] == "Q6_K" and chosen["blk.0.attn_q.weight"] == "Q8_0"
        assert {chosen[f"blk.{i}.ffn_down.weight"] for i in range(2)} == {"F16"}
        assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("Q8_0", "Q5_K")
    assert types(ours["NVFP4"])["blk.0.attn_k.weight"] == "NVFP4"

    # The type that MXFP4 and NVFP4 take the place of, where the user himself asks for it.
    _, plain = run(
        Recipe(str(checkpoint), "MXFP4", method="rtn", output_type="Q4_0", embedding_type="q4_0"),
        tmp_path / "plain",
        llamacpp,
    )
    chosen = types(plain["MXFP4"])
    assert (chosen["output.weight"], chosen["token_embd.weight"], chosen["blk.0.attn_q.weight"]) == (
        "Q4_0", "Q4_0", "MXFP4",
    )  # fmt: skip
    tied = make("llama", tmp_path / "tied", hidden_size=256, num_hidden_layers=2, tie_word_embeddings=True)
    _, both = run(
        Recipe(str(tied), "Q4_K_M,MXFP4", method="rtn", output_type="Q4_0", overrides={"blk.*.ffn_up.weight": "Q5_1"}),
        tmp_path / "both",
        llamacpp,
    )
    float_file = llamacpp.convert(tied, tmp_path / "tied.gguf", "f32")
    expected = llamacpp.quantize(
        float_file, tmp_path / "tied-theirs.gguf", "Q4_K_M", tensor_types={r"ffn_up\.weight$": "q5_1"},
        options=["--output-tensor-type", "q4_0"],
    )  # fmt: skip
    assert types(both["Q4_K_M"]) == types(GGUFFile(expected))
    assert types(both["MXFP4"])["token_embd.weight"] == types(both["Q4_K_M"])["token_embd.weight"]
    theirs = GGUFFile(
        llamacpp.quantize(
            original,
            tmp_path / "theirs.gguf",
            "Q4_K_M",
            tensor_types={
                r"^blk\.1\.attn_.\.weight$": "q6_k", r"^blk\..*\.attn_q\.weight$": "q8_0", "ffn_down": "f16",
            },
            options=["--output-tensor-type", "q8_0", "--token-embedding-type", "q5_k"],
        )
    )  # fmt: skip
    assert types(ours["Q4_K_M"]) == types(theirs)
    assert data_bytes(ours["Q4_K_M"]) == data_bytes(theirs)

    _, pure = run(Recipe(str(checkpoint), "Q3_K_M", method="rtn", pure=True), tmp_path / "pure", llamacpp)
    theirs = GGUFFile(llamacpp.quantize(original, tmp_path / "pure.gguf", "Q3_K_M", pure=True))
    assert types(pure["Q3_K_M"]) == types(theirs)


@pytest.mark.parametrize(
    ("method", "model", "names"),
    [
        ("qronos", "whole", ["Q4_0", "Q2_K", "IQ4_XS"]),
        ("gptq", "whole", ["Q4_0", "Q2_K"]),
        ("qronos", "experts", ["NVFP4", "Q4_K_M"]),  # each stream routes tokens its own way; scales beside tensors
        ("qronos", "tied", ["Q5_0", "Q3_K_M"]),  # substitutes
    ],
)
def test_formats_of_one_run_are_those_of_runs_alone(
    llamacpp: LlamaCpp, english: Path, tmp_path: Path, method: str, model: str, names: list[str]
) -> None:
    """The shared float stream changes nothing: same bytes, same errors."""
    family, config = MODELS[model]
    checkpoint = make(family, tmp_path / "tiny", **config)

    def once(formats: str, output: str) -> RunReport:
        recipe = Recipe(
            str(checkpoint), formats, transforms="none", method=method, calibration=str(english), samples=8,
            sequence_length=64, device="cpu",
        )  # fmt: skip
        report, _ = run(recipe, tmp_path / output, llamacpp)
        return report

    together = once(",".join(names), "together")
    alone = [once(name, name) for name in names]
    assert [a.sha256 for a in together.artifacts] == [report.artifacts[0].sha256 for report in alone]
    for report in alone:
        (artifact,) = report.artifacts
        mine = [layer for layer in together.layers if layer.artifact == artifact.format]
        assert [(layer.tensor, layer.error) for layer in mine] == [
            (layer.tensor, layer.error) for layer in report.layers
        ]
        assert {layer.method for layer in mine} == {method, "rtn"}  # the embedding's rows are read one by one


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"format": "Q4_0,Q4_9"}, UsageError, "no type 'Q4_9'; llama.cpp has .*Q4_0"),
        ({"format": "F16"}, PlanError, "F16 is a float type"),
        ({"overrides": {"*": "IQ2_XXS"}}, UsageError, "there is no type IQ2_XXS"),
        ({"overrides": {"blk.[01].attn_q.weight": "Q8_0"}}, UsageError, r"'\[' cannot be in the glob"),
        ({"output_type": "Q9"}, UsageError, "--output-type: there is no type Q9; known are .*Q8_0"),
        ({"embedding_type": "Q9"}, UsageError, "--embedding-type: there is no type Q9"),
        ({"overrides": {"blk.0.attn_norm.weight": "Q8_0"}}, PlanError, "change nothing of Q4_0: llama.cpp keeps blk.0"),
        (
            {"overrides": {"blk.*": "Q8_0", "blk.0.attn_q.weight": "Q5_0"}},
            PlanError,
            "attn_q.weight=Q5_0 would change nothing of Q4_0: overrides before it",
        ),
        (
            {"format": "IQ2_M", "model": "whole"},
            PlanError,
            "as IQ.*, which this version cannot write; it has .*Q4_K",
        ),
        ({"format": "Q1_0"}, PlanError, "cannot be Q1_0: its rows of 64 weights .* no substitute for this type"),
        ({"overrides": {"blk.*.attn_z.weight": "Q8_0"}}, UsageError, "fits no tensor of .*blk.0.ffn_down.weight"),
        ({"overrides": {"blk.*": "Q9_0"}}, UsageError, "there is no type Q9_0; known are .*Q8_0"),
        ({"output_type": "Q6_K"}, PlanError, "output.weight cannot be Q6_K: its rows of 64 weights do not divide"),
        (
            {"output_type": "Q8_0", "pure": True, "model": "tied"},
            PlanError,
            "--output-type Q8_0 would change nothing of Q4_0: .*token_embd.weight Q4_0. It is the output matrix, too",
        ),
        (
            {"format": "MXFP4", "output_type": "MXFP4", "pure": True, "model": "tied"},
            PlanError,
            "--output-type MXFP4 would change nothing of MXFP4",
        ),
        (
            {"output_type": "Q8_0", "embedding_type": "Q5_0", "model": "tied"},
            PlanError,
            "--output-type Q8_0 would change nothing of Q4_0: llama.cpp makes token_embd.weight Q5_0",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    llamacpp: LlamaCpp, tmp_path: Path, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    family, config = MODELS[more.pop("model", "narrow")]
    checkpoint = make(family, tmp_path / "tiny", **config)
    with pytest.raises(error, match=message):
        run(Recipe(str(checkpoint), method="rtn", **more), tmp_path / "out", llamacpp)
    assert not (tmp_path / "out").exists()
