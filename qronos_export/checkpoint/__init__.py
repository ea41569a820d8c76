"""Models in: what the user names becomes a folder of float safetensors, and that folder a model, block by block.

This package owns every import of transformers, safetensors and huggingface_hub. It refuses pickled weights,
weights that are already quantized and code that comes with a checkpoint (unless the caller trusts it).
"""

from .attention import attention_windows, head_sizes, round_cache
from .base_card import BaseCard, base_card
from .from_gguf import unpack
from .hollow import HollowModel, hollow_folder
from .hub import looks_like_id
from .lazy import LazyModel, load_whole
from .source import Checkpoint, open_checkpoint
from .tokens import continued, opening_token, tokenizer
from .writer import CheckpointWriter

__all__ = [
    "BaseCard",
    "Checkpoint",
    "CheckpointWriter",
    "HollowModel",
    "LazyModel",
    "attention_windows",
    "base_card",
    "continued",
    "head_sizes",
    "hollow_folder",
    "load_whole",
    "looks_like_id",
    "open_checkpoint",
    "opening_token",
    "round_cache",
    "tokenizer",
    "unpack",
]
