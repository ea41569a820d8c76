"""`evaluate`: llama.cpp's protocol in torch, and what it says of grids and activations without a file."""

from __future__ import annotations

import math
import resource
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from formats import FORMATS
from formats.ggml_reference import q8_0, q8_k
from qronos_export.activations import ACTIVATIONS, activation
from qronos_export.calibration import Clock, block_matrices, walk
from qronos_export.checkpoint import LazyModel, load_whole, open_checkpoint
from qronos_export.checkpoint.lazy import read_finite
from qronos_export.corpus import held_out_text, held_out_tokens
from qronos_export.decoder import Decoder, add_stream, enter
from qronos_export.errors import OutputError, TransformError, UsageError
from qronos_export.evaluation import Evaluated, Evaluation, _everything, evaluate
from qronos_export.events import Step
from qronos_export.online import online_model
from qronos_export.proof import Held
from qronos_export.recipe import ACTIVATIONS as NAMES
from qronos_export.recipe import Recipe, load_recipe, shipped
from qronos_export.resolved import matched
from qronos_export.streams import Passengers, calibrate
from tests.devices import DEVICES
from tests.families import FAMILIES, make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text(held_out_text()[:60_000])
    return path


def measure(model: Path, recipe: Recipe | None, text: Path, chunks: int = 6, device: str = "cpu") -> Evaluation:
    *_, done = evaluate(str(model), recipe, Held(text, 64, chunks), device=device, micro_batch=2)
    assert isinstance(done, Evaluated)
    return done.evaluation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_the_models_own(family: str, device: str, text: Path, tmp_path: Path) -> None:
    """Block by block as by transformers in one piece, whatever the family does to its logits."""
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny")))
    tokens = held_out_tokens(text, checkpoint, 64, 6)
    with torch.no_grad():
        logits = load_whole(checkpoint)(tokens).logits.float()
    losses = F.cross_entropy(logits[:, 32:-1].flatten(0, 1), tokens[:, 33:].flatten(), reduction="none").double()
    found = measure(checkpoint.folder, None, text, device=device)
    assert found.perplexity_reference == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    error = math.exp(losses.mean()) * losses.std(correction=0) / math.sqrt(len(losses) - 1)
    assert found.perplexity_reference_error == pytest.approx(float(error), rel=1e-4)
    assert (found.chunks, found.context, found.kl_divergence) == (6, 64, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_moe", "gemma3"])
def test_finer_is_closer(family: str, device: str, text: Path, tmp_path: Path) -> None:
    model = make(family, tmp_path / "tiny")
    recipe = Recipe(str(model), "INT8_G32", calibration=str(text), samples=6, sequence_length=64)

    def kl(**changes: str) -> float:
        found = measure(model, replace(recipe, **changes), text, device=device)
        assert found.kl_divergence is not None and found.kl_divergence_error is not None
        assert 0 < found.kl_divergence_error < found.kl_divergence
        return found.kl_divergence

    eight, four, two = kl(), kl(format="UINT4_G32"), kl(format="INT2")
    assert 0 < eight < four < two
    assert kl(activations="int4") > kl(activations="mxfp8")
    if family != "qwen3_moe":  # there a token routed elsewhere costs more than all else
        assert eight < 1e-3
        assert kl(activations="int8") > eight  # the inputs are rounded, too
    assert kl(format="INT2", method="rtn") > two


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if "`evaluate`" in path.read_text()])
def test_shipped_recipes_run(name: str, text: Path, tmp_path: Path) -> None:
    """Those for `evaluate`: all that each asks for fits a plain Llama."""
    recipe = load_recipe(
        name, model=str(make("llama", tmp_path / "tiny")), calibration=str(text), samples=4, sequence_length=64,
        spin_steps=2,
    )  # fmt: skip
    found = measure(Path(recipe.model), recipe, text)
    assert found.perplexity is not None and math.isfinite(found.perplexity)
    assert found.kl_divergence is not None and found.kl_divergence > 0


def test_what_is_measured_on_is_not_calibrated_on(tmp_path: Path) -> None:
    """Other held-out text, the same codes."""
    checkpoint = open_checkpoint(str(make("llama", tmp_path / "tiny")))
    tokens = torch.randint(5, 1000, (4, 48), generator=torch.Generator().manual_seed(0))

    class Kept:
        def __init__(self) -> None:
            self.blocks: dict[str, torch.Tensor] = {}

        def put(self, tensor, fmt, file_rows, blocks, values, scales) -> None:
            self.blocks[tensor.name] = blocks

    def codes(riding: Passengers | None) -> dict[str, torch.Tensor]:
        model, recipe = LazyModel(checkpoint, torch.device("cpu")), Recipe("tiny", "INT4_G32", transforms="none")
        kept = Kept()
        plan, output = _everything(model, recipe, kept)
        list(calibrate(model, plan, [output], tokens, recipe, Clock(), riding))
        return kept.blocks

    alone, ridden = codes(None), codes(Passengers(torch.randint(5, 1000, (3, 40))))
    assert len(alone) == 14 and all(torch.equal(blocks, ridden[name]) for name, blocks in alone.items())


def test_layers_are_tuned_on_tokens_held_out(text: Path, tmp_path: Path) -> None:
    """One sequence in four, which need not be a micro-batch; every group gets a λ, a ρ and a β of its own."""
    recipe = Recipe(
        str(make("llama", tmp_path / "tiny")), "INT3", calibration=str(text), samples=8, sequence_length=64,
        held_out=0.25, refine=1, stochastic=True, order="min_pivot", transforms="none", attention_aware=False,
    )  # fmt: skip

    def rounded(recipe: Recipe) -> set[tuple[float | None, ...]]:
        *events, done = evaluate(recipe.model, recipe, Held(text, 64, 2), device="cpu")
        layers = [event.layer for event in events if isinstance(event, Step) and event.layer]
        assert len(layers) == 14 and isinstance(done, Evaluated) and done.evaluation.kl_divergence
        return {(layer.damping, layer.shrinkage, layer.ridge) for layer in layers}

    groups = rounded(recipe)
    assert len(groups) == 8 and all(len({group[i] for group in groups}) > 1 for i in range(3))
    assert {group[1:] for group in rounded(replace(recipe, held_out=0))} == {(1.0, 0.5)}


def test_sequences_as_long_as_the_prompts(text: Path, tmp_path: Path) -> None:
    """`match_lengths` is the numbers it stands for."""
    model = make("llama", tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text(held_out_text()[:4000])
    recipe = Recipe(
        str(model), "INT4_G32", calibration=str(text), samples=6, match_lengths=str(tmp_path / "prompts.txt")
    )
    found = matched(recipe, open_checkpoint(str(model)))
    assert found.sequence_length < 64
    assert measure(model, recipe, text) == measure(model, found, text)


def test_scratch_space_that_is_too_small(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms write the model in float32, twice where one follows another; without them nothing is written."""
    model = make("llama", tmp_path / "tiny", dtype=torch.bfloat16)
    one = 2 * (model / "model.safetensors").stat().st_size
    recipe = Recipe(str(model), "INT8", calibration=str(text), samples=2, sequence_length=64)

    def tried(transforms: str, free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, free))
        measure(model, replace(recipe, transforms=transforms), text)

    usage = namedtuple("usage", "total used free")
    tried("none", 0)
    tried("permute", one)
    for transforms, free in (("permute", one - 1), ("permute,equalize", 2 * one - 1)):
        with pytest.raises(OutputError, match=r"has .* GB free; .* GB are needed there"):
            tried(transforms, free)


@pytest.mark.parametrize(("limit", "says"), [(40_000, "outside.safetensors|block-00000"), (1_000, "TMPDIR")])
def test_a_disk_that_is_full(limit: int, says: str, text: Path, tmp_path: Path) -> None:
    """First where safetensors writes, then where we do; the kernel refuses what makes a file larger than `limit`."""
    model = make("llama", tmp_path / "tiny")
    recipe = Recipe(str(model), "INT8", calibration=str(text), samples=2, sequence_length=64, transforms="permute")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match=says):
            *_, _ = evaluate(str(model), recipe, Held(None if limit == 1_000 else text, 64, 2), device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_mix_is_for_files(text: Path, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "tiny")
    for format, message in (("Q4_K_M", "there is no format Q4_K_M"), ("Q4_K", "blocks of 256"), ("Q4_0,Q8_0", "one")):
        with pytest.raises(UsageError, match=message):
            measure(model, Recipe(str(model), format, method="rtn"), text)
    with pytest.raises(UsageError, match="computes in float32, not in bfloat16"):
        measure(model, Recipe(str(model), "Q8_0", compute_dtype="bfloat16"), text)
    for given, message in (
        ({"method": "rtn", "compute_dtype": "bfloat16"}, "compute_dtype is for forwards of calibration"),
        ({"method": "rtn", "offload": "disk"}, "offload is for forwards of calibration"),
        ({"state_dtype": "bfloat16"}, "add offload"),
        ({"offload": "cloud"}, "cloud"),
    ):
        with pytest.raises(UsageError, match=message):
            Recipe(str(model), **given)


def test_rounding_to_nearest_looks_at_no_text(text: Path, tmp_path: Path) -> None:
    """Nor at the few tokens that it is shown instead, by which no layer of more inputs could be calibrated."""
    model = make("llama", tmp_path / "tiny", intermediate_size=1024)
    *_, done = evaluate(str(model), Recipe(str(model), "UINT3", method="rtn"), Held(text, 64, 2), device="cpu")
    assert isinstance(done, Evaluated) and not done.notes


def test_an_online_rotation_spreads_what_down_reads(text: Path, tmp_path: Path) -> None:
    """With outliers there, 4-bit activations hurt less; with float ones nothing changes."""
    checkpoint = open_checkpoint(str(make("llama", tmp_path / "tiny")))
    loud = {}
    for name, weight in read_finite(checkpoint, checkpoint.tensors).items():
        loud[name] = weight.clone()
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            rows = loud[name] if name.endswith("up_proj.weight") else loud[name].T
            rows[::16] *= 30 if name.endswith("up_proj.weight") else 1 / 30
    save_file(loud, checkpoint.folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe(
        str(checkpoint.folder), "INT8_G32", transforms="none", calibration=str(text), samples=6, sequence_length=64
    )

    def kl(**changes: str) -> float:
        found = measure(checkpoint.folder, replace(recipe, **changes), text).kl_divergence
        assert found is not None
        return found

    assert kl(online="r4") < 1e-3
    assert kl(online="r4", activations="int4") < 0.9 * kl(activations="int4")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("name", ["r4", "quip"])
def test_online_rotations_keep_the_function(family: str, name: str, tmp_path: Path) -> None:
    """Logits of the float model, from weights of which none is left as it was."""
    checkpoint = open_checkpoint(str(make(family, tmp_path / "tiny")))
    plain, turned = LazyModel(checkpoint), online_model([name], checkpoint)
    assert type(turned) is not LazyModel
    ids = torch.randint(5, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    for index, block_name in enumerate(plain.block_names):
        before, after = (block_matrices(each.load_block(index), block_name) for each in (plain, turned))
        for weight in before:
            changed = float((before[weight] - after[weight]).norm() / before[weight].norm())
            assert changed > 0.5 if name == "quip" or "down" in weight else changed == 0
    expected, found = (each.model(input_ids=ids, use_cache=False).logits for each in (plain, turned))
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_incoherent_layers_that_share_an_input_stay_a_group(tmp_path: Path) -> None:
    model = online_model(["quip"], open_checkpoint(str(make("llama", tmp_path / "tiny"))))
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, torch.randint(5, 1000, (4, 24)).split(2))
    add_stream(decoder, model.embedding, model.embedding.weight, batches)
    stops = walk(model.load_block(0), 0, "block", batches, lambda _: True, Clock())
    assert [len(group.matrices) for _, groups in stops for group in groups] == [3, 1, 2, 1]


@pytest.mark.parametrize("name", ["r4", "quip"])
def test_experts_are_not_rotated_online(name: str, tmp_path: Path) -> None:
    with pytest.raises(TransformError, match=f"{name} does not fit tiny: it has experts; .* --set online=none"):
        online_model([name], open_checkpoint(str(make("mixtral", tmp_path / "tiny"))))


def test_a_cache_of_few_bits_costs_something(text: Path, tmp_path: Path) -> None:
    """All weights float: the cache is all that differs, and the float model is measured with none."""
    model = make("llama", tmp_path / "tiny", head_dim=64, num_hidden_layers=1)
    recipe = Recipe(str(model), "F32", method="rtn")

    def found(**changes: Any) -> Evaluation:
        return measure(model, replace(recipe, **changes), text, 3)

    none, eight, five, four = (
        found(kv_cache=cache) for cache in ({}, {"k": "q8_0", "v": "q8_0"}, {"k": "q5_1"}, {"k": "q4_0", "v": "q4_0"})
    )
    assert 0 <= abs(none.kl_divergence) < eight.kl_divergence < five.kl_divergence < four.kl_divergence
    assert len({each.perplexity_reference for each in (none, eight, five, four)}) == 1
    integers = {"kv_cache": {"k": "int4"}}
    assert found(**integers).kl_divergence != found(**integers, online="r3").kl_divergence
    with pytest.raises(UsageError, match=r"r3 does not fit .* heads of 64"):
        found(kv_cache={"k": "q4_0"}, online="r3")


def test_inputs_are_rounded_by_the_type_of_the_weight(text: Path, tmp_path: Path) -> None:
    """What llama.cpp multiplies Q4_0 with is q8_0, and Q4_K with q8_k; floats read what comes."""
    model = make("llama", tmp_path / "tiny", hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)

    def kl(format: str, activations: str) -> float:
        recipe = Recipe(str(model), format, method="rtn", activations=activations)
        found = measure(model, recipe, text, 2).kl_divergence
        assert found is not None
        return found

    for format, kind, other in (("Q4_0", "q8_0", "q8_k"), ("Q4_K", "q8_k", "q8_0"), ("F32", "none", "q8_0")):
        assert kl(format, "llama.cpp") == kl(format, kind) != kl(format, other)
    assert [activation("llama.cpp", FORMATS[name]) for name in ("IQ4_XS", "TQ2_0", "TQ1_0", "Q6_K")] == [q8_k] * 4
    assert [activation("llama.cpp", FORMATS[name]) for name in ("Q5_1", "NVFP4", "Q1_0", "IQ4_NL")] == [q8_0] * 4
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        rounding = activation("llama.cpp", FORMATS[name])
        assert rounding is not None and torch.equal(rounding(x), x.to(dtype).float())
    assert kl("BF16", "llama.cpp") > 1.5 * kl("BF16", "none")
    with pytest.raises(UsageError, match=r"llama\.cpp has no kernel for INT4"):
        kl("INT4_G32", "llama.cpp")


def test_recipes_know_every_activation() -> None:
    assert NAMES[:2] == ("none", "llama.cpp") and sorted(NAMES[2:]) == sorted(ACTIVATIONS)


def test_activations_are_rounded_as_their_formats_say() -> None:
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 512)
    for name, bits in (("int8", 8), ("int4", 4)):
        rounded = ACTIVATIONS[name](x)
        steps = (x.amax(1) - x.amin(1)) / (2**bits - 1)
        assert all(len(row.unique()) <= 2**bits for row in rounded)
        assert bool(((rounded - x).abs() <= 1.01 * steps[:, None]).all())
        assert torch.equal(ACTIVATIONS[name](torch.zeros(1, 32)), torch.zeros(1, 32))
    for name, block in (("q8_0", 32), ("q8_k", 256)):
        blocks, rounded = (each.unflatten(1, (-1, block)) for each in (x, ACTIVATIONS[name](x)))
        scale = blocks.abs().amax(2, keepdim=True) / 127
        scale = scale.half().float() if name == "q8_0" else scale
        steps = rounded / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert float(steps.abs().max()) < 127.5 and float((rounded - blocks).abs().max()) > 0
        assert bool(((rounded - blocks).abs() <= 0.57 * scale).all())  # half a step, and what fp16 does to 127 of them
    for name, emax, largest in (("mxfp4", 2, 6.0), ("mxfp8", 8, 448.0)):
        rounded = ACTIVATIONS[name](x).unflatten(1, (-1, 32))
        scale = 2.0 ** (x.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True).log2().floor() - emax)
        assert float((rounded / scale).abs().max()) <= largest
        if name == "mxfp8":
            expected = (x.unflatten(1, (-1, 32)) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(rounded, expected)
        else:
            assert set((rounded / scale).abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
        assert torch.equal(ACTIVATIONS[name](torch.zeros(1, 32)), torch.zeros(1, 32))
