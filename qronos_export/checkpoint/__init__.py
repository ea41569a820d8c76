"""Models in: what the user names becomes a folder of float safetensors, and that folder a model, block by block.

This package owns every import of transformers, safetensors and huggingface_hub. It refuses pickled weights,
weights that are already quantized and code that comes with a checkpoint (unless the caller trusts it).
"""

from .attention import attention_windows, head_sizes, round_cache
from .from_gguf import unpack
from .hollow import HollowModel, hollow_folder
from .lazy import LazyModel, load_whole
from .source import Checkpoint, open_checkpoint
from .tokens import opening_token, tokenizer
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "HollowModel",
    "LazyModel",
    "attention_windows",
    "head_sizes",
    "hollow_folder",
    "load_whole",
    "open_checkpoint",
    "opening_token",
    "round_cache",
    "tokenizer",
    "unpack",
]
