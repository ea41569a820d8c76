"""What the user calls MODEL, resolved to a folder of float safetensors, and checked before anything is computed.

A folder is used where it lies; a hub id is downloaded; a float GGUF and the demo are unpacked into the cache once.
Only headers are read here: `lazy.py` reads weights.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qronos_export.errors import CheckpointError

from . import demo, from_gguf, hub
from .shards import StoredTensor, stored_dtype, stored_tensors

FLOAT_SUFFIX = re.compile(r"[-._](f32|f16|bf16|fp32|fp16)$", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """A float checkpoint on disk."""

    name: str
    """Stem of output files."""
    source: str
    """What the user typed."""
    folder: Path
    """config.json, *.safetensors and the tokenizer's files."""
    dtype: torch.dtype
    """Of most of the weights as their author stored them."""
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    """Checkpoint key -> where it lies."""
    float_gguf: Path | None = None
    """The file itself, where the user gave a float GGUF."""
    repository: str | None = None
    """owner/name, where the user gave a hub id."""
    revision: str | None = None
    """Its commit."""
    trust_remote_code: bool = False
    """The caller vouches for Python code that lies in `folder`."""


def open_checkpoint(model: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint `model` names: a folder, a float .gguf, `demo`, or a hub id `owner/name[@revision]`, so ordered.

    Raises CheckpointError where it is absent, damaged, pickled, already quantized or of an unknown architecture.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name, model, trust_remote_code=trust_remote_code)
    if path.suffix == ".gguf":
        dtype, folder = from_gguf.float_folder(path)
        return _open_folder(folder, FLOAT_SUFFIX.sub("", path.stem), model, float_gguf=path.resolve(), dtype=dtype)
    if model == "demo":
        return _open_folder(demo.folder(), demo.NAME, model)
    if hub.looks_like_id(model) and not path.exists():
        repository, wanted = hub.split(model)
        folder, revision = hub.download(repository, wanted)
        name = repository.rpartition("/")[2]
        origin: dict[str, Any] = {"repository": repository, "revision": revision}
        return _open_folder(folder, name, model, **origin, trust_remote_code=trust_remote_code)
    what = "is a file of another kind" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{model} {what}; MODEL is a folder with config.json and *.safetensors, a float .gguf, "
        f"a hub id such as HuggingFaceTB/SmolLM2-135M, or `demo`."
    )


def _open_folder(folder: Path, name: str, source: str, *, dtype: torch.dtype | None = None, **rest: Any) -> Checkpoint:
    _check_config(folder, rest.get("trust_remote_code", False))
    tensors = stored_tensors(folder)
    return Checkpoint(name, source, folder, dtype or stored_dtype(tensors), tensors, **rest)


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json; give a Hugging Face checkpoint folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a transformers configuration with a model_type ({error!r}).") from error
    if quantized := config.get("quantization_config"):
        how = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(f"{folder} is already quantized ({how}); give the float checkpoint it was made from.")

    import transformers
    from transformers import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING or (trust_remote_code and "auto_map" in config):
        return
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder} is a {model_type!r}, which transformers {transformers.__version__} runs only with the Python "
            f"code inside the checkpoint. Read that code, then allow it with trust_remote_code=True."
        )
    raise CheckpointError(
        f"{folder} is a {model_type!r}, an architecture transformers {transformers.__version__} does not know; "
        f"a newer transformers may."
    )
