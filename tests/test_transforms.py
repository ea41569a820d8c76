"""Transforms leave the function of a model as it is, on every tiny family; and what each is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats import FORMATS
from qronos_export.checkpoint import Checkpoint, open_checkpoint
from qronos_export.errors import TransformError
from qronos_export.recipe import TRANSFORMS as NAMES
from qronos_export.rounding.gptq import gptq
from qronos_export.rounding.rounded import Settings
from qronos_export.statistics import LayerStats
from qronos_export.transformed import logits, transformed
from qronos_export.transforms import TRANSFORMS, InputStats
from qronos_export.transforms.hadamard import hadamard, random_rotation
from qronos_export.transforms.scaling import AQAS, AWQ, Equalize, conditional_variance
from tests.families import FAMILIES, make


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {family: open_checkpoint(str(make(family, folder / family))) for family in FAMILIES}


def tokens(checkpoint: Checkpoint, samples: int = 6) -> torch.Tensor:
    return torch.randint(5, 1000, (samples, 48), generator=torch.Generator().manual_seed(0))


def apply(checkpoint: Checkpoint, names: list[str], folder: Path, seed: int = 0) -> Checkpoint:
    return transformed(
        checkpoint, names, tokens=tokens(checkpoint), formats=["Q4_0"], seed=seed, micro_batch=2, folder=folder
    )


def test_recipes_know_every_transform() -> None:
    assert tuple(TRANSFORMS) == NAMES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_logits_stay(models: dict[str, Checkpoint], family: str, name: str, tmp_path: Path) -> None:
    before = models[family]
    if (family, name) == ("gemma3", "hadamard"):
        with pytest.raises(TransformError, match=r"hadamard does not fit gemma3: .* gain on what it adds"):
            apply(before, [name], tmp_path)
        return
    after = apply(before, [name], tmp_path)
    probe = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, found = logits(before, probe), logits(after, probe)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    changed = _weights(before).keys() ^ _weights(after).keys()
    assert changed == ({"lm_head.weight"} if name == "hadamard" and family in ("llama_tied", "qwen3") else set())
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
        s = kind("Q4_0").factors([weight], known, lambda factors: factors)

        def error(s: torch.Tensor, known: InputStats = known, x: torch.Tensor = x) -> float:
            fmt, importance = FORMATS["Q4_0"], known.hessian.diagonal() / s.square() if kind is AWQ else None
            stored = fmt.dequantize(fmt.quantize(weight * s, importance)) / s
            return float((x @ (stored - weight).T).square().sum())

        assert error(s) <= error(torch.ones(64)) * 1.02
        if loud > 1:
            assert error(s) < 0.7 * error(torch.ones(64))


def test_conditional_variances_are_in_storage_order() -> None:
    """Of independent inputs, their own; where one repeats another, next to nothing for the one that is met first."""
    power = torch.rand(96, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    found = conditional_variance(power.diag())
    torch.testing.assert_close(found, power + 3e-2 * power.mean())
    twins = power.diag()
    twins[3, 70] = twins[70, 3] = (twins[3, 3] * twins[70, 70]).sqrt() * 0.999
    assert float((conditional_variance(twins) / found)[[3, 70]].min()) < 0.3


def test_equalized_columns_round_better_with_feedback() -> None:
    """Where columns differ in size, what GPTQ leaves of the output error falls; where they do not, it stays."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    stats = LayerStats.of(x.T @ x / len(x), x.T @ x / len(x), len(x))
    known = InputStats(stats.hessian, x.abs().amax(0), x[:200])
    for spread, bound in ((0.0, 1.02), (0.6, 0.85)):
        size = (spread * torch.randn(128, generator=generator)).exp()
        weight = torch.randn(96, 128, generator=generator) * size
        s = Equalize("Q4_0").factors([weight], known, lambda factors: factors)

        def error(s: torch.Tensor, weight: torch.Tensor = weight) -> float:
            scaled = LayerStats.of(stats.hessian / s / s[:, None], stats.hessian / s / s[:, None], len(x))
            stored = gptq(weight * s, scaled, FORMATS["Q4_0"], Settings(0.01, 0.0, "blocks")).weight.dequantize() / s
            return float((x @ (stored - weight).T).square().sum())

        assert error(s) < bound * error(torch.ones(128))


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from qronos_export.checkpoint.lazy import read_finite

    return read_finite(checkpoint, checkpoint.tensors)
