"""The tokenizer of a checkpoint, the token its model expects first, and tokens as text."""

from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qronos_export.errors import CheckpointError

from .source import Checkpoint


def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
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


def continued(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> tuple[str, str]:
    """The text of `before`, and what `token` adds to it: tokens alone have lost their spaces, or are parts of a
    character. A token that adds none, or part of one, is shown by its name in the vocabulary."""
    text, whole = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (list(before), [*before, token])
    )
    same = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole)))
    piece = whole[same:]
    if not piece or "�" in piece:
        return text, str(tokenizer.convert_ids_to_tokens(token) or f"[{token}]")  # models have more ids than tokenizers
    return text[:same], piece
