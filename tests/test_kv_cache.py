"""Keys and values rounded as a cache keeps them: in which stream, in which order, after which rotation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from formats.ggml_reference import q4_0, q4_1, q8_0
from qronos_export import calibration
from qronos_export.activations import per_token
from qronos_export.artifact.gguf import Target
from qronos_export.calibration import Clock, Runtime
from qronos_export.checkpoint import LazyModel, head_sizes, open_checkpoint, round_cache
from qronos_export.decoder import Decoder, add_stream, enter
from qronos_export.errors import UsageError
from qronos_export.kv_cache import KVCache
from qronos_export.recipe import Recipe
from qronos_export.streams import _key_order, rounded_cache
from tests.families import FAMILIES, make


def heads(size: int, length: int = 24) -> Tensor:
    """Two sequences of three heads, with an outlier in one place of each: [2, 3, length, size]."""
    x = torch.randn(2, 3, length, size, generator=torch.Generator().manual_seed(0))
    x[..., 5] += 20
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_quantized_stream_attends_to_rounded_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the model whose attention function, replaced for all, rounds keys and values; the other is the model."""
    model = LazyModel(open_checkpoint(str(make(family, tmp_path / "tiny"))))
    assert head_sizes(model) == {32}
    ids = torch.randint(5, 1000, (4, 24), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, ids.split(2))
    add_stream(decoder, model.embedding, model.embedding.weight, batches)
    runtime = Runtime(prepare=lambda block, name: round_cache(block, q4_0, q4_1))
    for index, name in enumerate(model.block_names):
        for _ in calibration.walk(model.load_block(index), index, name, batches, lambda _: True, Clock(), runtime):
            pass
    x, x_hat = (
        torch.cat([decoder.leave(batch.tokens, state) for batch, state in zip(batches, states, strict=True)])
        for states in ([batch.x for batch in batches], [batch.x_hat[0] for batch in batches])
    )
    # 1e-4: experts' sums run in another order than transformers' own
    torch.testing.assert_close(x, model.model.get_decoder()(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda module, q, k, v, *args, **kwargs: attend(module, q, q4_0(k), q4_1(v), *args, **kwargs),
    )
    expected = model.model.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(x_hat, expected, rtol=1e-4, atol=1e-4)
    assert float((x - x_hat).abs().max()) > 1e-2, "the rounding was meant to be felt"


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


@pytest.mark.parametrize(("size", "turned"), [(64, 64), (128, 128), (192, 64)])
def test_llamacpps_rotation(size: int, turned: int) -> None:
    """Keys by the largest power of two in a head, values by 64; nothing where sizes differ or at 16 bits."""
    x, cache = heads(size), KVCache("q4_0", "q8_0", frozenset({size}))
    for rounding, run, rule in ((cache.keys(), turned, q4_0), (cache.values(), 64, q8_0)):
        matrix = sylvester(run)
        there = (x.unflatten(-1, (-1, run)) @ matrix).flatten(-2)
        expected = (rule(there).unflatten(-1, (-1, run)) @ matrix).flatten(-2)
        assert torch.equal(rounding(x), expected) and not torch.equal(expected, rule(x))
    several = KVCache("q4_0", "q8_0", frozenset({size, size + 64}))
    assert torch.equal(several.keys()(x), q4_0(x)) and torch.equal(several.values()(x), q8_0(x))
    plain = KVCache("f16", "int8", frozenset({size}))
    assert torch.equal(plain.keys()(x), x.half().float()) and torch.equal(plain.values()(x), per_token(x, 8))


def test_small_heads_are_not_rotated() -> None:
    x, cache = heads(96), KVCache("q4_0", "q8_0", frozenset({96}))
    assert torch.equal(cache.keys()(x), q4_0(x)) and torch.equal(cache.values()(x), q8_0(x))


def test_keys_are_rounded_in_the_files_order() -> None:
    x, order = heads(64), torch.arange(64).view(2, 32).T.flatten()
    cache = KVCache("q4_0", "q8_0", frozenset({64}))
    assert torch.equal(cache.keys(order)(x)[..., order], cache.keys()(x[..., order]))
    assert not torch.equal(cache.keys(order)(x), cache.keys()(x))
    rows = torch.cat([order, order + 64])
    targets = [
        Target("blk.0.attn_q.weight", "q", rows, rows),
        Target("blk.0.attn_k.weight", "k", rows, torch.arange(128)),
    ]
    found = _key_order(targets, cache)
    assert found is not None and torch.equal(found, order)
    rows = torch.cat([torch.zeros(64, dtype=torch.int64), order + 64])  # a head of equal rows says nothing
    found = _key_order([Target("blk.0.attn_k.weight", "k", rows, torch.arange(128))], cache)
    assert found is not None and torch.equal(found, order)
    assert _key_order(targets[:1], cache) is None


def test_r3_spreads_outliers_of_keys() -> None:
    """By itself it changes nothing; with one loud number in each head, rounding costs a fraction."""
    x = heads(96)
    cache, turned = (KVCache("int4", "f16", frozenset({96}), r3=r3) for r3 in (False, True))
    assert torch.equal(turned.values()(x), cache.values()(x))
    error, less = (float((each.keys()(x) - x).square().mean()) for each in (cache, turned))
    assert less < 0.3 * error
    sixteen = KVCache("int8", "f16", frozenset({96}), r3=True).keys()(x)
    torch.testing.assert_close(sixteen, x, rtol=0, atol=0.3)


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"kv_cache: {v: q4_0} has blocks of 32, which do not divide heads of 80"):
        KVCache("f16", "q4_0", frozenset({80}))
    with pytest.raises(UsageError, match=r"r3 does not fit .* heads of 128: llama\.cpp's cache rotates these keys"):
        KVCache("q4_0", "f16", frozenset({128}), r3=True)
    KVCache("f16", "int4", frozenset({80}))
    tiny = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}
    shapes: dict[str, dict] = {
        "deepseek_v3": {"kv_lora_rank": 32, "first_k_dense_replace": 2, "num_attention_heads": 2},
        "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 2},
    }
    for kind, says in (("deepseek_v3", "a DeepseekV3Attention, does not keep"), ("gpt_neo", "no part of its decoder")):
        folder = tmp_path / kind
        config = AutoConfig.for_model(kind, **{**tiny, **shapes[kind]})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with pytest.raises(UsageError, match=says):
            rounded_cache(Recipe(str(folder), kv_cache={"k": "q8_0"}), LazyModel(open_checkpoint(str(folder))))
