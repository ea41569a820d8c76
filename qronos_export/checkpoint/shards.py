"""The safetensors files of a folder: where each tensor is, and that every file is whole. Never reads weights."""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from qronos_export.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies: `bytes` from `start` of the file. `dtype` is safetensors' own name of the
    type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by its checkpoint key, in file order.

    Raises CheckpointError if there are none, if a shard named by the index is absent, cut short or unreadable,
    or if a shard lacks a tensor the index promises.
    """
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(_no_safetensors(folder))
        return {key: tensor for file in files for key, tensor in read_header(file).items()}
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}); fetch it again.") from error
    found: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name} that {INDEX} names; fetch the checkpoint again.")
        found |= read_header(folder / name)
    for key, name in weight_map.items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(f"{folder / name} lacks the tensor {key} that {INDEX} places in it.")
    return {key: found[key] for key in weight_map}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError unless the file is exactly as long as its header says."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (actual,)
        if start.startswith(b"version "):
            raise CheckpointError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder.")
        if 8 + length > actual:
            raise CheckpointError(_cut_short(file, 8 + length, actual))
        try:
            header = json.loads(stream.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            expected = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
            found = {}
            for key, value in tensors.items():
                begin, end = value["data_offsets"]
                shape = tuple(value["shape"])
                found[key] = StoredTensor(file, value["dtype"], shape, 8 + length + begin, end - begin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} has no readable safetensors header ({error!r}); fetch it again.") from error
    if actual != expected:
        raise CheckpointError(_cut_short(file, expected, actual))
    return found


def stored_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The float type that holds most of the weights; float32 where none of the four usual ones is there."""
    weights: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in DTYPES:
            weights[DTYPES[tensor.dtype]] += torch.Size(tensor.shape).numel()
    return max(weights, key=lambda dtype: weights[dtype], default=torch.float32)


def _cut_short(file: Path, expected: int, actual: int) -> str:
    return (
        f"{file} has {actual} bytes, its header promises {expected}: the file is truncated or damaged. "
        f"Fetch the checkpoint again."
    )


def _no_safetensors(folder: Path) -> str:
    if pickles := sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}")):
        return (
            f"{folder} holds weights only as pickle ({pickles[0]}), which can run code when it is read. "
            f"Convert it with transformers' `save_pretrained` and give that folder."
        )
    return f"{folder} holds no *.safetensors file; give a Hugging Face checkpoint folder."
