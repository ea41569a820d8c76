"""A checkpoint folder written block by block, so that a changed model never is in memory as a whole."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from qronos_export.errors import OutputError

from .lazy import LazyModel
from .quiet import quiet
from .shards import INDEX

_OUTSIDE = "outside"


class CheckpointWriter:
    """Writes what `model` holds at the time, in float32, under the names of a checkpoint; one shard a block. Raises
    OutputError where a shard cannot be written: safetensors' own error is no OSError, even for a full disk."""

    def __init__(self, model: LazyModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        folder.mkdir(parents=True)

    def block(self, index: int) -> None:
        """The loaded block `index` as it is now."""
        name = self._model.block_names[index]
        state = self._model.blocks[index].state_dict()
        self._save({f"{name}.{key}": value for key, value in state.items()}, f"block-{index:05}")

    def close(self, *, tied: bool) -> None:
        """Everything outside of the blocks, the index, and what belongs to a checkpoint beside its weights."""
        inside = tuple(f"{name}." for name in self._model.block_names)
        state = self._model.model.state_dict()
        outside = {key: value for key, value in state.items() if not key.startswith(inside) and not value.is_meta}
        if tied:
            for key in self._model.model.all_tied_weights_keys:
                outside.pop(key, None)
        self._save(outside, _OUTSIDE)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        (self._folder / INDEX).write_text(json.dumps(index))
        for file in self._model.checkpoint.folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX, "config.json"):
                shutil.copy(file, self._folder)
        config = json.loads((self._model.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = tied
                part["dtype"] = "float32"
                part.pop("torch_dtype", None)
        (self._folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _save(self, state: dict[str, Tensor], shard: str) -> None:
        with quiet():
            state = revert_weight_conversion(self._model.model, state)
        tensors = {
            key: (value.to(torch.float32) if value.is_floating_point() else value).cpu().contiguous()
            for key, value in state.items()
        }
        file = f"{shard}.safetensors"
        try:
            save_file(tensors, self._folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"Writing {self._folder / file} failed: {error}. Make room there.") from error
        self._weight_map |= dict.fromkeys(tensors, file)
        self._bytes += sum(value.nbytes for value in tensors.values())
