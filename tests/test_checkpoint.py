"""A checkpoint in: what is accepted, what is refused and why, and that a lazy model is the model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qronos_export.checkpoint import LazyModel, demo, load_whole, open_checkpoint, opening_token, tokenizer
from qronos_export.checkpoint.from_gguf import read_model
from qronos_export.errors import CheckpointError
from tests.families import FAMILIES, make

PROMPT = "The quick brown fox jumps over the lazy dog. In 1987,  33 people went to Paris; the capital of France is"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make("phi3", tmp_path / "tiny")


def rewrite(folder: Path, **entries: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entries))


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_block_by_block_is_from_pretrained_exactly(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make(family, tmp_path / family)))
    lazy, whole = LazyModel(checkpoint), load_whole(checkpoint)
    ids = torch.randint(whole.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    for index in range(len(lazy.blocks)):
        lazy.load_block(index)
    assert torch.equal(lazy.model(ids).logits, whole(ids).logits)
    assert lazy.tied == whole.config.tie_word_embeddings
    assert lazy.unused == []
    assert not any(parameter.requires_grad for parameter in lazy.model.parameters())


def test_a_released_block_holds_no_memory_and_comes_back_the_same(tiny: Path) -> None:
    lazy = LazyModel(open_checkpoint(str(tiny)))
    assert all(parameter.is_meta for parameter in lazy.blocks.parameters())
    first = {name: p.clone() for name, p in lazy.load_block(1).named_parameters()}
    assert all(parameter.is_meta for parameter in lazy.blocks[0].parameters())
    lazy.release_block(1)
    assert all(parameter.is_meta for parameter in lazy.blocks.parameters())
    again = dict(lazy.load_block(1).named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_changing_a_loaded_block_leaves_the_file_alone(tiny: Path) -> None:
    before = (tiny / "model.safetensors").read_bytes()
    lazy = LazyModel(open_checkpoint(str(tiny)))
    for parameter in lazy.load_block(0).parameters():
        parameter.zero_()
    assert (tiny / "model.safetensors").read_bytes() == before


def test_stored_dtype_names_the_checkpoint_and_compute_is_float32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make("phi3", tmp_path / "half", dtype=torch.bfloat16)))
    assert checkpoint.dtype == torch.bfloat16
    assert {p.dtype for p in LazyModel(checkpoint).load_block(0).parameters()} == {torch.float32}


def shard(folder: Path) -> dict[str, str]:
    """Split the only file in two and index it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {key: names[position % 2] for position, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_make_the_same_model(tiny: Path) -> None:
    single = LazyModel(open_checkpoint(str(tiny))).load_block(0).state_dict()
    shard(tiny)
    sharded = LazyModel(open_checkpoint(str(tiny))).load_block(0).state_dict()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to read ahead")
def test_what_is_read_ahead_is_the_next_block(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = LazyModel(open_checkpoint(str(tiny))), list[bytes]()

    def advise(handle: int, start: int, length: int, advice: int) -> None:
        asked.append(os.pread(handle, length, start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    model.load_block(0)
    tensors = load_file(tiny / "model.safetensors")
    wanted = [tensor.numpy().tobytes() for key, tensor in tensors.items() if ".layers.1." in key]
    assert sorted(asked) == sorted(wanted)
    model.load_block(len(model.blocks) - 1)
    assert len(asked) == len(wanted), "there is nothing behind the last"
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: (tiny / "gone").stat())
    model.load_block(0)  # a hint that fails is no error


def test_a_missing_shard_is_named(tiny: Path) -> None:
    shard(tiny)
    (tiny / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-00002-of-00002.safetensors"):
        open_checkpoint(str(tiny))


def test_a_truncated_shard_is_named_with_both_sizes(tiny: Path) -> None:
    shard(tiny)
    file = tiny / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 50, 4):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{file.name} has {size} bytes, its header promises \d+"):
            open_checkpoint(str(tiny))


def test_a_shard_without_a_promised_tensor_is_named(tiny: Path) -> None:
    weight_map = shard(tiny)
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"absent.weight": weight_map["model.norm.weight"]}}))
    with pytest.raises(CheckpointError, match=r"lacks the tensor absent\.weight"):
        open_checkpoint(str(tiny))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    lazy = LazyModel(open_checkpoint(str(tiny)))
    lazy.load_block(0)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.down_proj.weight in .* holds NaN or infinity"):
        lazy.load_block(1)


def test_an_incomplete_block_is_named(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for mlp.down_proj.weight of model.layers.1"):
        LazyModel(open_checkpoint(str(tiny))).load_block(1)


def test_weights_of_another_shape_are_named(tiny: Path) -> None:
    rewrite(tiny, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.\w+.weight is \[.*config.json makes it"):
        LazyModel(open_checkpoint(str(tiny))).load_block(0)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized \\(gptq\\)"),
        ({"model_type": "llama9"}, "'llama9', an architecture transformers .* does not know"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.C"}}, "trust_remote_code=True"),
    ],
)
def test_configurations_that_cannot_be_used(entries: dict[str, object], says: str, tiny: Path) -> None:
    rewrite(tiny, **entries)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(tiny))


def test_a_model_that_is_no_language_model(tiny: Path) -> None:
    rewrite(tiny, model_type="vit")
    with pytest.raises(CheckpointError, match="does not run as a causal language model"):
        LazyModel(open_checkpoint(str(tiny)))


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pickle \(pytorch_model.bin\)"):
        open_checkpoint(str(tiny))


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "a/b/c"])
def test_what_is_nothing_is_answered_with_what_could_be(model: str) -> None:
    with pytest.raises(CheckpointError, match="MODEL is a folder"):
        open_checkpoint(model)


def test_a_quantized_gguf_is_refused() -> None:
    with pytest.raises(CheckpointError, match="already quantized; give the float model"):
        open_checkpoint(str(demo.wheel_gguf()))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nonsense" * 100)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_the_demo_computes_what_its_wheel_computes_and_lies_on_no_grid() -> None:
    checkpoint = open_checkpoint("demo")
    ids = tokenizer(checkpoint)(PROMPT, return_tensors="pt").input_ids
    whole = load_whole(checkpoint)
    original = read_model(demo.wheel_gguf())
    with torch.no_grad():
        assert (whole(ids).logits - original(ids).logits).abs().max() < 1e-3
    for before, after in zip(original.model.layers.modules(), whole.model.layers.modules(), strict=True):
        if isinstance(before, torch.nn.Linear):  # a Q4_1 block of 32 weights has at most 16 values
            assert max(len(block.unique()) for block in before.weight[:50].unflatten(1, (-1, 32)).flatten(0, 1)) <= 16
            assert min(len(block.unique()) for block in after.weight[:50].unflatten(1, (-1, 32)).flatten(0, 1)) > 16


def test_the_opening_token_is_the_tokenizers_own(tiny: Path) -> None:
    assert opening_token(tokenizer(open_checkpoint(str(tiny)))) == 1
    assert opening_token(tokenizer(open_checkpoint("demo"))) is None
