"""Transforms leave the function of a model as it is, on every tiny family; and what each is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from formats import FORMATS
from qronos_export.activations import ACTIVATIONS
from qronos_export.calibration import Clock
from qronos_export.checkpoint import Checkpoint, LazyModel, load_whole, open_checkpoint
from qronos_export.decoder import Decoder
from qronos_export.errors import TransformError
from qronos_export.evaluation import _everything, _Nowhere
from qronos_export.online import Rotated
from qronos_export.recipe import TRANSFORMS as NAMES
from qronos_export.recipe import Recipe
from qronos_export.rounding.gptq import gptq
from qronos_export.rounding.least_squares import conditional_variance
from qronos_export.rounding.rounded import Settings
from qronos_export.statistics import LayerStats
from qronos_export.streams import Passengers, calibrate
from qronos_export.transformed import SEQUENCES, _spread, logits, transformed, whole
from qronos_export.transforms import TRANSFORMS, Goal, InputStats
from qronos_export.transforms.hadamard import hadamard, random_rotation
from qronos_export.transforms.scaling import AQAS, AWQ, Equalize
from qronos_export.transforms.spinquant import Rounded, cayley_step, learned, nearest_rotation
from tests.families import FAMILIES, RELATIVES, make


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {family: open_checkpoint(str(make(family, folder / family))) for family in (*FAMILIES, *RELATIVES)}


def tokens(checkpoint: Checkpoint, samples: int = 6) -> torch.Tensor:
    return torch.randint(5, 1000, (samples, 48), generator=torch.Generator().manual_seed(0))


def apply(checkpoint: Checkpoint, names: list[str], folder: Path, seed: int = 0, **more: Any) -> Checkpoint:
    return transformed(
        checkpoint, names, tokens=tokens(checkpoint), formats=["Q4_0"], seed=seed, micro_batch=2, folder=folder,
        spin_steps=2, **more,
    )  # fmt: skip


def test_recipes_know_every_transform() -> None:
    assert tuple(TRANSFORMS) == NAMES


@pytest.mark.parametrize("family", (*FAMILIES, *RELATIVES))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_logits_stay(models: dict[str, Checkpoint], family: str, name: str, tmp_path: Path) -> None:
    before = models[family]
    centred = dict.fromkeys(("stablelm", "starcoder2", "nemotron"), "is no plain RMS norm")
    reason = {"gemma3": "gain on what it adds", **centred}.get(family)
    if reason and name in ("hadamard", "spinquant"):
        with pytest.raises(TransformError, match=rf"{name} does not fit {family}: .* {reason}"):
            apply(before, [name], tmp_path)
        return
    after = apply(before, [name], tmp_path)
    probe = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, found = logits(before, probe), logits(after, probe)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    changed = _weights(before).keys() ^ _weights(after).keys()
    unties = name in ("hadamard", "spinquant") and family in ("llama_tied", "qwen3")
    assert changed == ({"lm_head.weight"} if unties else set())
    different = [key for key, value in _weights(before).items() if not torch.allclose(value, _weights(after)[key])]
    blocks = len([key for key in _weights(before) if key.endswith("o_proj.weight")])
    touched = {"permute": 3, "hadamard-r2": 2}.get(name, 4)  # in every block
    assert len(different) >= touched * blocks


def test_transforms_follow_one_another_and_repeat(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    one, two, other = (
        apply(models["llama"], ["awq", "hadamard"], tmp_path / name, seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(value, _weights(two)[key]) for key, value in _weights(one).items())
    assert not torch.equal(_weights(one)["lm_head.weight"], _weights(other)["lm_head.weight"])
    assert (one.name, one.source) == (models["llama"].name, models["llama"].source)


def test_learned_rotations_repeat_with_the_seed(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    plain, one, two, other = (
        _weights(apply(models["llama"], [name], tmp_path / place, seed))
        for name, place, seed in (
            ("hadamard", "a", 0),
            ("spinquant", "b", 0),
            ("spinquant", "c", 0),
            ("spinquant", "d", 1),
        )
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    for unlike in (plain, other):
        assert not torch.allclose(one["lm_head.weight"], unlike["lm_head.weight"], atol=1e-3)


def test_a_transform_that_changes_the_model_is_refused(
    models: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, one that overlooks a reader."""
    from qronos_export import transformed as module

    dissect = module.dissect

    def careless(*arguments):
        found = dissect(*arguments)
        norms = tuple(type(norm)(norm.name, norm.module, norm.readers[1:]) for norm in found.norms)
        return type(found)(norms, found.writers, found.pairs, found.loose)

    monkeypatch.setattr(module, "dissect", careless)
    with pytest.raises(TransformError, match="changed what llama computes"):
        apply(models["llama"], ["hadamard"], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_of_norms(models: dict[str, Checkpoint], family: str) -> None:
    """What a norm multiplies with, whatever of it is stored and whatever is added; looking changes nothing."""
    checkpoint = models[family]
    model = LazyModel(checkpoint)
    before = _weights(checkpoint)
    for found in whole(model, tokens(checkpoint, 1)).anatomies[0].norms:
        stored = before[f"{model.block_names[0]}.{found.name}.weight"].double()
        assert torch.equal(found.gain, stored + (family in ("gemma3", "nemotron")))
        assert torch.equal(found.weight.double(), stored)
        if found.bias is not None:
            assert torch.equal(found.bias, before[f"{model.block_names[0]}.{found.name}.bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_scales_pass_through(models: dict[str, Checkpoint], family: str) -> None:
    """A product with a gate; no activation function. StarCoder2's inner matrices have names of their own."""
    anatomy = whole(LazyModel(models[family]), tokens(models[family], 1)).anatomies[0]
    found = {pair.kind: pair.is_linear for pair in anatomy.pairs}
    inner = {"starcoder2": {}, "nemotron": {"inner": False}}.get(family, {"inner": True})
    assert found == {"value": True, **inner}


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 64, 76, 576, 768, 896, 960, 1536, 2560, 3072, 3584])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 576, 52, 92, 90])
def test_rotations_are_orthogonal(size: int) -> None:
    """Also where no Hadamard matrix of this order is known to us."""
    rotation = random_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    assert (hadamard(size) is None) == (size in (52, 92, 90))
    assert not torch.equal(rotation, random_rotation(size, torch.Generator().manual_seed(1)))


def test_rotations_spread_outliers(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Weights with a few large columns round better after the rotation."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 576, generator=generator, dtype=torch.float64)
    weight[:, ::57] *= 20
    rotated = (weight @ random_rotation(576, generator)).float()
    fmt = FORMATS["Q4_0"]

    def error(w: torch.Tensor) -> float:
        return float((fmt.dequantize(fmt.quantize(w)) - w).square().sum() / w.square().sum())

    assert error(rotated) < 0.6 * error(weight.float())


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_permutation_puts_like_channels_side_by_side(
    models: dict[str, Checkpoint], family: str, tmp_path: Path
) -> None:
    """Columns of `down` in the order of their norms; the rows are those of the original, each as a whole."""
    before, after = _weights(models[family]), _weights(apply(models[family], ["permute"], tmp_path))
    downs = [name for name in after if name.endswith(("down_proj.weight", "w2.weight"))]
    assert downs
    for name in downs:
        power = after[name].float().square().sum(0)
        assert bool((power.diff() >= -1e-6 * power[1:]).all())
        assert torch.equal(power, before[name].float().square().sum(0).sort().values)


@pytest.mark.parametrize("kind", [AWQ, AQAS])
def test_searches_keep_the_output(kind: type) -> None:
    """On inputs with loud channels the searched scales lower the output error; on even ones nothing gets worse."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    for loud in (1.0, 30.0):
        x = torch.randn(2000, 64, generator=generator)
        x[:, ::16] *= loud
        known = InputStats(x.T @ x / len(x), x.abs().amax(0), x[:500])
        s = kind(Goal("Q4_0", 0)).factors([weight], known, lambda factors: factors)

        def error(s: torch.Tensor, known: InputStats = known, x: torch.Tensor = x) -> float:
            fmt, importance = FORMATS["Q4_0"], known.hessian.diagonal() / s.square() if kind is AWQ else None
            stored = fmt.dequantize(fmt.quantize(weight * s, importance)) / s
            return float((x @ (stored - weight).T).square().sum())

        assert error(s) <= error(torch.ones(64)) * 1.02
        if loud > 1:
            assert error(s) < 0.7 * error(torch.ones(64))


@pytest.mark.parametrize("kind", [AQAS, Equalize])
def test_searches_round_inputs_as_the_run_will(kind: type) -> None:
    """Four bits a token make other scales best than eight in blocks, which are llama.cpp's where nothing is named; and
    the objective, of inputs rounded to four bits, is lower with the former."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 64, generator=generator), torch.randn(2000, 64, generator=generator)
    x[:, ::16] *= 30
    known = InputStats(x.T @ x / len(x), x.abs().amax(0), x[:500])

    def found(activations: str) -> torch.Tensor:
        return kind(Goal("Q8_0", 0, activations)).factors([weight], known, lambda factors: factors)

    def error(s: torch.Tensor) -> float:
        return float(((ACTIVATIONS["int4"](known.sample / s) * s - known.sample) @ weight.T).square().sum())

    assert torch.equal(found("none"), found("llama.cpp")) and torch.equal(found("none"), found("q8_0"))
    assert not torch.equal(found("none"), found("int4"))
    assert error(found("int4")) < 0.99 * error(found("none"))


def test_every_process_has_a_sequence_to_search_on() -> None:
    for count, world in ((128, 20), (128, 24), (100, 16), (9, 2), (3, 1)):
        chosen = _spread(count, max(SEQUENCES, world)).tolist()
        assert len(chosen) == min(count, max(SEQUENCES, world)) >= min(world, count)
        assert chosen[0] == 0 and chosen == sorted(set(chosen)) and count - chosen[-1] <= -(-count // len(chosen))


def test_conditional_variances_are_in_storage_order() -> None:
    """Of independent inputs, their own; where one repeats another, next to nothing for the one that is met first."""
    power = torch.rand(96, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    found = conditional_variance(power.diag(), 3e-2, "blocks")
    torch.testing.assert_close(found, power + 3e-2 * power.mean())
    twins = power.diag()
    twins[3, 70] = twins[70, 3] = (twins[3, 3] * twins[70, 70]).sqrt() * 0.999
    assert float((conditional_variance(twins, 3e-2, "blocks") / found)[[3, 70]].min()) < 0.3


def test_equalized_columns_round_better_with_feedback() -> None:
    """Where columns differ in size, what GPTQ leaves of the output error falls; where they do not, it stays."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    stats = LayerStats.of(x.T @ x / len(x), x.T @ x / len(x), len(x))
    known = InputStats(stats.hessian, x.abs().amax(0), x[:200])
    for spread, bound in ((0.0, 1.02), (0.6, 0.85)):
        size = (spread * torch.randn(128, generator=generator)).exp()
        weight = torch.randn(96, 128, generator=generator) * size
        s = Equalize(Goal("Q4_0", 0)).factors([weight], known, lambda factors: factors)

        def error(s: torch.Tensor, weight: torch.Tensor = weight) -> float:
            scaled = LayerStats.of(stats.hessian / s / s[:, None], stats.hessian / s / s[:, None], len(x))
            stored = gptq(weight * s, scaled, FORMATS["Q4_0"], Settings(0.01, 0.0, "blocks")).weight.dequantize() / s
            return float((x @ (stored - weight).T).square().sum())

        assert error(s) < bound * error(torch.ones(128))


@contextmanager
def rounding(
    model: LazyModel, format: str, activations: str = "none", seed: int = 0, compute: str = "float32"
) -> Iterator[Rounded]:
    goal = Goal(format, seed, activations, compute_dtype=compute)
    rounded = Rounded(whole(model, tokens(model.checkpoint)), goal)
    yield rounded
    rounded.close()


def floats(rotations: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [rotation.float().requires_grad_() for rotation in rotations]


def test_every_width_has_its_own_rounding_of_inputs(models: dict[str, Checkpoint]) -> None:
    """As llama.cpp multiplies Q4_K_M: rows that 256 does not divide are another type's, with another kernel."""
    ids = tokens(models["llama"], 1)
    losses = []
    for activations in ("none", "llama.cpp", "q8_0"):
        with rounding(LazyModel(models["llama"]), "Q4_K_M", activations) as rounded:
            leaves = floats(rounded.draw(torch.Generator().manual_seed(0)))
            losses.append(float(rounded.loss(ids, leaves).detach()))
    assert losses[0] != losses[1] == losses[2]


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "phi3", "mixtral"])
def test_no_rotation_changes_the_loss_without_rounding(models: dict[str, Checkpoint], family: str) -> None:
    """Nor does the gradient point anywhere along the rotations: every place where one is used is accounted for."""
    ids = tokens(models[family], 1)
    expected = F.cross_entropy(load_whole(models[family])(ids).logits[0, :-1], ids[0, 1:])
    kind = LazyModel if family == "mixtral" else Rotated
    steepness = []
    for format in ("F32", "INT2"):
        with rounding(kind(models[family]), format) as rounded:
            leaves = floats(rounded.draw(torch.Generator().manual_seed(0)))
            assert len(leaves) == 3  # R1, and R2 of both blocks
            loss = rounded.loss(ids, leaves)
            assert (abs(float((loss - expected).detach())) < 1e-5 * float(expected)) == (format == "F32")
            along = [g @ r.detach().T for g, r in zip(torch.autograd.grad(loss, leaves), leaves, strict=True)]
            steepness.append([float((each - each.T).norm()) for each in along])
    assert all(flat < 1e-3 * steep for flat, steep in zip(*steepness, strict=True))


@pytest.mark.parametrize(("family", "kind"), [("llama", LazyModel), ("llama", Rotated), ("mixtral", LazyModel)])
def test_what_is_learned_from_is_what_evaluate_rounds(
    models: dict[str, Checkpoint], family: str, kind: type[LazyModel], tmp_path: Path
) -> None:
    """Hadamard's rotations, applied for good and rounded to nearest there, as in the first step of SpinQuant's."""
    ids, recipe = tokens(models[family], 2), Recipe("tiny", "INT2", activations="int4", method="rtn")
    lazy = kind(apply(models[family], ["hadamard"], tmp_path))
    plan, output = _everything(lazy, recipe, _Nowhere())
    riding = Passengers(ids)
    list(calibrate(lazy, plan, [output], ids, recipe, Clock(), riding))
    (batch,) = riding.batches
    said = lazy.logits(ids, Decoder(lazy.model.get_decoder(), lazy.blocks).leave(ids, batch.x_hat[0]))
    expected = float(F.cross_entropy(said[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    with rounding(kind(models[family]), "INT2", "int4") as rounded:
        leaves = floats(rounded.draw(torch.Generator().manual_seed(0)))
        assert float(rounded.loss(ids, leaves).detach()) == pytest.approx(expected, rel=2e-3)
    for format, activations in (("INT2", "none"), ("INT8", "int4")):
        with rounding(kind(models[family]), format, activations) as rounded:
            assert float(rounded.loss(ids, leaves).detach()) != pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("family", "format", "activations", "margin", "compute"), [
    ("llama", "INT2", "none", 0.2, "float32"), ("llama", "INT2", "none", 0.2, "bfloat16"),
    ("phi3", "MXFP4", "mxfp4", 0.1, "float32"), ("mixtral", "INT2", "int4", 0.2, "float32"),
    ("mixtral", "INT2", "int4", 0.2, "bfloat16"),
])  # fmt: skip
def test_learning_lowers_the_loss_of_the_rounded_model(
    models: dict[str, Checkpoint], family: str, format: str, activations: str, margin: float, compute: str
) -> None:
    """On fresh scales before and after; and the rotations stay rotations."""
    losses, seen = [], []
    with rounding(LazyModel(models[family]), format, activations, compute=compute) as rounded:
        generator = torch.Generator().manual_seed(0)
        begun = rounded.draw(generator)
        rotations = learned(rounded, begun, 12, generator, lambda done, total: seen.append((done, total)))
        for each in (begun, rotations):
            rounded.forget_scales(slice(None))
            losses.append(float(rounded.loss(rounded.tokens, floats(each)).detach()))
    before, after = losses
    assert after < before - margin
    assert seen == [(step, 12) for step in range(1, 13)]
    for rotation in rotations:
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_learning_in_bfloat16_goes_the_same_way(models: dict[str, Checkpoint], family: str) -> None:
    """Its gradients are float32's but for the eight bits that products keep."""
    found = []
    for compute in ("float32", "bfloat16"):
        with rounding(LazyModel(models[family]), "INT4", compute=compute) as rounded:
            leaves = floats(rounded.draw(torch.Generator().manual_seed(0)))
            loss = rounded.loss(rounded.tokens, leaves)
            found.append((float(loss.detach()), torch.autograd.grad(loss, leaves)))
    (exact, gradients), (rough, others) = found
    assert rough == pytest.approx(exact, rel=5e-3) and rough != exact
    for gradient, other in zip(gradients, others, strict=True):
        assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.95


def test_cayley_steps_go_downhill_among_rotations() -> None:
    """To first order by rate · ‖Y‖²; a step never moves far; the orthogonal matrix nearest to `target` is the end."""
    generator = torch.Generator().manual_seed(0)
    rotation, eye = random_rotation(24, generator), torch.eye(24, dtype=torch.float64)
    skew = torch.randn(24, 24, generator=generator, dtype=torch.float64) / 8
    stretch = torch.randn(24, 24, generator=generator, dtype=torch.float64) / 8
    end = torch.linalg.matrix_exp(skew - skew.T) @ rotation
    target = end @ (eye + stretch @ stretch.T)
    assert float((end - rotation).norm()) > 3
    torch.testing.assert_close(nearest_rotation(target), end)
    along = -target @ rotation.T  # the gradient of −⟨target, R⟩ is −target
    steepness = float(((along - along.T) / 2).square().sum())
    small = cayley_step(rotation, -target, 1e-7) - rotation
    assert float((target * small).sum()) == pytest.approx(1e-7 * steepness, rel=1e-4)
    assert float((cayley_step(rotation, -1e6 * target, 1.5) - rotation).norm()) <= 1
    for _ in range(300):
        rotation = cayley_step(rotation, -target, 0.5)
    torch.testing.assert_close(rotation, end)


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from qronos_export.checkpoint.lazy import read_finite

    return read_finite(checkpoint, checkpoint.tensors)
