"""The tokenizer of a checkpoint, and the token its model expects first."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qronos_export.errors import CheckpointError

from .source import Checkpoint

Tokenizer = PreTrainedTokenizerBase


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer. Raises CheckpointError where the folder's files do not make one."""
    try:
        found = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} has no usable tokenizer: {error}. Copy the tokenizer's files (tokenizer.json or "
            f"tokenizer.model, tokenizer_config.json) next to config.json; a tokenizer.model alone also needs "
            f"`pip install protobuf`."
        ) from error
    if len(found) == 0:
        raise CheckpointError(f"{checkpoint.folder} has a tokenizer without vocabulary; fetch its files again.")
    return found


def opening_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id the tokenizer itself puts before a text (BOS), or None; llama.cpp puts the same one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    return dressed[0] if dressed[:1] != plain[:1] else None
