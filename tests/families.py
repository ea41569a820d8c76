"""Tiny random checkpoints of real model families, as transformers saves them: what the tests quantize.

Weights are lively on purpose (gains off 1, biases off 0, logits far from flat), so that a permuted row or a forgotten
bias shows. Tokenizers are ones llama.cpp's converter accepts: SmolLM2's own, or a sentencepiece model trained here.
"""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, AutoModelForCausalLM, GemmaTokenizer, LlamaTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import generate_merges

from qronos_export.checkpoint import open_checkpoint
from qronos_export.checkpoint.quiet import quiet
from qronos_export.corpus import held_out_text

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False, "hidden_size": 128},
    "qwen3": {"tie_word_embeddings": True},
    # Every sixth layer attends globally, as llama.cpp assumes of Gemma 3; so does its query scale.
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": 64,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {
        "hidden_size": 128,
        "tie_word_embeddings": False,
        "original_max_position_embeddings": 512,
        "sliding_window": None,
        "resid_pdrop": 0.0,
    },
    "mixtral": {"tie_word_embeddings": False, "num_local_experts": 4, "sliding_window": None, **EXPERTS},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        **EXPERTS,
    },
    # LayerNorms with biases, and in the latter two no gate: what `up` returns goes through an activation function.
    # Heads are as large as hidden_size says.
    "stablelm": {"tie_word_embeddings": False, "hidden_size": 128},
    "starcoder2": {"tie_word_embeddings": False, "hidden_size": 128, "sliding_window": None},
    "nemotron": {"tie_word_embeddings": False, "hidden_size": 128},
}
RELATIVES = ("stablelm", "nemotron")
"""What is new in them is in starcoder2, too, so that most tests do without."""
FAMILIES: tuple[str, ...] = tuple(family for family in CONFIGS if family not in RELATIVES)
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    # llama.cpp looks this token up in whatever is called phi3.
    "phi3": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "control_symbols": "<|endoftext|>"},
    "gemma3": {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "user_defined_symbols": "<mask>",
    },
}
SENTENCEPIECE |= dict.fromkeys(("llama_tied", "mixtral", "nemotron"), SENTENCEPIECE["llama"])
VOCABULARY = 1024


def make(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny `family` model and its tokenizer to `folder`; `overrides` are entries of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if family in SENTENCEPIECE:
            tokens = _save_sentencepiece(SENTENCEPIECE[family], folder)
        else:
            tokens = _save_smollm(family, folder)
        settings = {"model_type": family, **SMALL, **CONFIGS[family], **tokens, **overrides}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
        enliven(model, seed)
        model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def enliven(model: PreTrainedModel, seed: int) -> None:
    """Seeded random weights that keep activations of order one and make the logits spread."""
    generator = torch.Generator().manual_seed(seed)
    outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter += noise / 4
        else:
            parameter.copy_(noise / 4 if any(parameter is one for one in outer) else noise / parameter.shape[-1] ** 0.5)


def _save_smollm(family: str, folder: Path) -> dict[str, Any]:
    for file in open_checkpoint("demo").folder.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, folder)
    if family == "qwen2":  # else transformers rebuilds the tokenizer with Qwen's splitting rule, which is not SmolLM2's
        config = folder / "tokenizer_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Class", None]}})
        )
    return {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def _save_sentencepiece(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """tokenizer.model for llama.cpp and the same as tokenizer.json; the config entries that go with them."""
    model = _sentencepiece(tuple(options.items()))
    (folder / "tokenizer.model").write_bytes(model)
    pieces = SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {piece: pieces.get_score(i) for piece, i in vocabulary.items() if i > vocabulary["<0xFF>"]}
    kind = GemmaTokenizer if "<bos>" in vocabulary else LlamaTokenizer
    kind(vocab=vocabulary, merges=generate_merges(vocabulary, scores), add_bos_token=True).save_pretrained(folder)
    ids = {f"{name}_token_id": options[f"{name}_id"] for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(pieces)} | {name: i if i >= 0 else None for name, i in ids.items()}


@cache
def _sentencepiece(options: tuple[tuple[str, Any], ...]) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(held_out_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **dict(options),
    )
    return model.getvalue()
