"""A GGUF file back to a Hugging Face folder, by transformers' own reader, once per content.

The weights come out in float32, so nothing a float file holds is lost. Only the demo may read a quantized file.
"""

import hashlib
import io
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.reader import GgufHeader
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from qronos_export.cache import cache_folder
from qronos_export.errors import CheckpointError, OutputError

from .meta import parameters_on_meta
from .quiet import quiet

UNREADABLE = (ValueError, KeyError, RuntimeError, NotImplementedError, AssertionError)
"""What transformers raises on an architecture or a tokenizer it cannot read back."""


def float_folder(gguf: Path) -> tuple[torch.dtype, Path]:
    """The file's float type and a cached folder with its model and tokenizer.

    Raises CheckpointError where the file is absent, no GGUF, holds quantized tensors, or is of an architecture
    that transformers cannot read back.
    """
    if not gguf.is_file():
        raise CheckpointError(f"{gguf} does not exist.")
    try:
        dtype = GgufHeader.from_file(str(gguf)).dtype
    except (ValueError, LookupError, struct.error) as error:
        raise CheckpointError(f"{gguf} cannot be read as GGUF: {error}") from error
    if dtype is None:
        raise CheckpointError(f"{gguf} is already quantized; give the float model (F32, F16 or BF16).")
    with gguf.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def save(folder: Path) -> None:
        save_folder(read_model(gguf), read_tokenizer(gguf), folder)

    return dtype, built_once(cache_folder() / "from-gguf" / content, save)


def unpack(gguf: Path, folder: Path, like: Path | None = None) -> None:
    """Write `gguf`, quantized or not, to `folder` as a float32 checkpoint of the values it holds.

    like: a checkpoint's folder whose configuration and tokenizer to take; transformers reads neither back in full.
    Raises CheckpointError.
    """
    model = read_model(gguf, like)
    if like is None:
        tokenizer = read_tokenizer(gguf)
    else:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(like)
    save_folder(model, tokenizer, folder)
    if like is not None and (like / "generation_config.json").is_file():
        shutil.copy(like / "generation_config.json", folder)


def read_model(gguf: Path, like: Path | None = None) -> PreTrainedModel:
    """The model in float32, dequantized where it must be; with the configuration in folder `like`, where that is given.
    Raises CheckpointError."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(like or gguf.parent, **({} if like else {"gguf_file": gguf.name}))
            with parameters_on_meta():
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            # Not from_pretrained(gguf_file=...): its models carry a quantizer, and save_pretrained refuses them.
            with redirect_stderr(io.StringIO()):  # its progress bar has no other switch
                tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
            missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
            model.tie_weights()
    except UNREADABLE as error:
        raise CheckpointError(f"transformers cannot read {gguf} back: {error}. Give the original folder.") from error
    if lost := sorted({*unexpected, *missing} - model.all_tied_weights_keys.keys()):
        raise CheckpointError(f"transformers cannot place {lost[0]} when it reads {gguf}. Give the original folder.")
    return model.eval().requires_grad_(False)


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except UNREADABLE as error:
        raise CheckpointError(f"transformers cannot read the tokenizer in {gguf}: {error}.") from error


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` unless it exists; it appears whole or not at all, also when two processes race."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be written: {error}. Set QRONOS_EXPORT_CACHE elsewhere.") from error
    try:
        build(aside)
        aside.chmod(0o755)
        aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise OutputError(f"{folder} could not be filled: {error}. Set QRONOS_EXPORT_CACHE elsewhere.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
