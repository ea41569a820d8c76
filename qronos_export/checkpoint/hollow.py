"""A checkpoint's shapes without its weights: a folder whose files have holes, and a model that takes no memory.

Upstream's converter and the model's own forward say what becomes of a checkpoint; neither needs the weights for that.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from qronos_export.errors import OutputError

from .architecture import Architecture
from .quiet import quiet
from .shards import DTYPES, INDEX
from .source import Checkpoint


def hollow_folder(checkpoint: Checkpoint, folder: Path, *, transformed: bool = False, untied: bool = False) -> Path:
    """`checkpoint` below `folder`, under its own name, with zeros for weights that take no room on a disk.

    transformed: in float32, as transforms write it; untied: with an output matrix of its own beside the embedding.
    Raises OutputError.
    """
    target = folder / checkpoint.folder.name
    try:
        target.mkdir(parents=True)
        for file in checkpoint.folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
                shutil.copy(file, target)
        if transformed:
            _as_written(target / "config.json", untied)
        _save_holes(checkpoint, target / "model.safetensors", transformed, untied)
    except OSError as error:
        raise OutputError(f"Writing {target} failed: {error}. Set TMPDIR to another disk.") from error
    return target


def _as_written(file: Path, untied: bool) -> None:
    """config.json as CheckpointWriter leaves it."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["dtype"] = "float32"
            part.pop("torch_dtype", None)
            if untied:
                part["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _save_holes(checkpoint: Checkpoint, file: Path, transformed: bool, untied: bool) -> None:
    """u64 length of the header | header, JSON: name -> dtype, shape, place | a hole as long as all tensors."""
    tensors = {key: (each.dtype, each.shape) for key, each in checkpoint.tensors.items()}
    if untied:
        model = HollowModel(checkpoint)
        names = {id(parameter): name for name, parameter in model.model.named_parameters(remove_duplicate=False)}
        if model.tied and model.head is not None:  # the head comes last
            tensors.setdefault(names[id(model.head.weight)], ("F32", tuple(model.head.weight.shape)))
    header: dict[str, dict[str, object]] = {}
    end = 0
    for key, (stored, shape) in tensors.items():
        kind = "F32" if transformed and stored in DTYPES else stored
        size = torch.Size(shape).numel() * (DTYPES[kind].itemsize if kind in DTYPES else _bytes(kind))
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    written = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(written)) + written)
        stream.truncate(8 + len(written) + end)


def _bytes(kind: str) -> int:
    """Of one number of a type that is none of the usual floats: I64, U8, BOOL, F8_E4M3, …"""
    digits = "".join(filter(str.isdigit, kind.partition("_")[0]))
    return int(digits or 8) // 8


class HollowModel(Architecture):
    """A LazyModel's parts without weights: the rows of each matrix share one in memory.

    Forwards run and tell shapes; what they compute means nothing.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError where transformers has no causal language model for it."""
        super().__init__(checkpoint, torch.float32)
        with quiet():
            self.model.tie_weights()
        self.model.set_experts_implementation("eager")  # what multiplies all experts at once needs real strides
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        self._fill(self.model, inside)

    def load_block(self, index: int) -> nn.Module:
        block = self.blocks[index]
        self._fill(block, set())
        return block

    def _fill(self, module: nn.Module, leave: set[int]) -> None:
        filled: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None or not parameter.is_meta or id(parameter) in leave:
                    continue
                if id(parameter) not in filled:
                    filled[id(parameter)] = nn.Parameter(_filling(parameter), requires_grad=False)
                part._parameters[name] = filled[id(parameter)]


def _filling(like: Tensor) -> Tensor:
    """Ones, or rows that are all one row: enough for norms to change what they are given."""
    if like.ndim < 2:
        return torch.ones(like.shape, dtype=like.dtype)
    return torch.linspace(-1, 1, like.shape[-1], dtype=like.dtype).expand(like.shape)
