"""A causal language model whose decoder blocks come to memory one at a time, so that depth costs disk only.

transformers renames and fuses checkpoint tensors as it loads them (Mixtral's experts w1, w2, w3 become two 3-D
parameters). Its own machinery does that here too, on the tensors of one block per call; this file only decides
which tensors those are. It refuses checkpoints that do not fill the model and weights that are not finite.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from qronos_export.errors import CheckpointError
from qronos_export.precision import hasten

from .architecture import Architecture
from .quiet import quiet
from .shards import StoredTensor
from .source import Checkpoint

OUTSIDE = -1


class LazyModel(Architecture):
    """The architecture with everything outside of its decoder blocks in memory, and the blocks on the meta device.

    `load_block(i)` fills block `i` in place; `release_block(i)` drops it again. Loaded whole, it computes exactly what
    `from_pretrained` does.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Raises CheckpointError where transformers has no causal language model for it or tensors do not fit."""
        super().__init__(checkpoint, dtype)
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        conversions = get_model_conversion_mapping(self.model)
        self._load_config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=conversions,  # type: ignore[arg-type]  # what from_pretrained passes, too
        )
        self._keys, self.unused = self._keys_by_block(conversions)
        self._materialise_outside()

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of `hidden` [sequences, length, hidden], outputs of its decoder for `tokens`: float32
        [sequences, length, vocabulary]. By its own forward, so scales and caps are in it."""
        inner = self.model.get_decoder()
        inner.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
        try:
            return cast(Tensor, self.model(input_ids=tokens, use_cache=False).logits).float()
        finally:
            del inner.forward

    def load_block(self, index: int) -> nn.Module:
        """`blocks[index]`, its weights read from disk; raises CheckpointError where they are missing or not finite."""
        block = self.blocks[index]
        self._load(self._keys[index])
        _check_filled(self.block_names[index], block.named_parameters(), self.checkpoint)
        _read_ahead([self.checkpoint.tensors[key] for key in self._keys.get(index + 1, ())])
        return block.requires_grad_(False)

    def release_block(self, index: int) -> None:
        """Back to the meta device, whatever the parameters have become meanwhile."""
        for module in self.blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _keys_by_block(self, conversions: list) -> tuple[dict[int, list[str]], list[str]]:
        """Checkpoint keys per block index (OUTSIDE for the rest), and those the model has no place for."""
        renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
        places = self.model.state_dict()
        prefix = self.model.base_model_prefix
        owner = {
            name: index
            for index, block_name in enumerate(self.block_names)
            for name in (f"{block_name}.{inner}" for inner in self.blocks[index].state_dict())
        }
        keys: dict[int, list[str]] = {index: [] for index in (OUTSIDE, *range(len(self.blocks)))}
        unused = []
        for key in self.checkpoint.tensors:
            place, _ = rename_source_key(key, renamings, converters, prefix, places)
            if place not in places:
                place, _ = rename_source_key(key, [], [], prefix, places)
            if place in places:
                keys[owner.get(place, OUTSIDE)].append(key)
            else:
                unused.append(key)
        return keys, unused

    def _materialise_outside(self) -> None:
        info = self._load(self._keys[OUTSIDE])
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        inside = tuple(f"{name}." for name in self.block_names)
        outside = ((name, p) for name, p in self.model.named_parameters() if not name.startswith(inside))
        _check_filled("the model", outside, self.checkpoint)
        self.model.requires_grad_(False)

    def _load(self, keys: list[str]) -> LoadStateDictInfo:
        with quiet(), _one_thread():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, read_finite(self.checkpoint, keys), self._load_config
            )
        for name, stored, wanted in info.mismatched_keys:
            raise CheckpointError(
                f"{name} is {list(stored)} in {self.checkpoint.folder}, config.json makes it {list(wanted)}; "
                f"they are not of one checkpoint."
            )
        for name, why in info.conversion_errors.items():
            raise CheckpointError(f"{name} cannot be made of the tensors in {self.checkpoint.folder}: {why}")
        return info


def _read_ahead(tensors: Iterable[StoredTensor]) -> None:
    """Have the system read what is needed next while the caller computes, where it has a way to be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file, parts in groupby(sorted(tensors, key=lambda each: (each.file, each.start)), lambda each: each.file):
        with suppress(OSError), file.open("rb") as opened:  # who reads it tells what is wrong
            for part in parts:
                os.posix_fadvise(opened.fileno(), part.start, part.bytes, os.POSIX_FADV_WILLNEED)


def load_whole(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The complete model by `from_pretrained`, in eval mode and with its cache on: for sampling text and for tasks."""
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=checkpoint.trust_remote_code,
            )
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{checkpoint.folder} does not load as a language model: {error}") from error
    model.eval().requires_grad_(False)
    hasten(model)
    return cast(PreTrainedModel, nn.Module.to(model, device))


def read_finite(checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the stored tensors; the files are closed again, so no page of them stays mapped.

    Raises CheckpointError naming the first tensor that holds NaN or infinity, or a file that is gone.
    """
    tensors = {}

    def file_of(key: str) -> Path:
        return checkpoint.tensors[key].file

    for file, group in groupby(sorted(keys, key=file_of), file_of):
        try:
            with safe_open(file, framework="pt") as shard:
                for key in group:
                    tensor = shard.get_tensor(key).clone()
                    if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
                        raise CheckpointError(f"{key} in {file} holds NaN or infinity; the checkpoint is damaged.")
                    tensors[key] = tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} was there when the run began and cannot be read any more ({error}). Put it back."
            ) from error
    return tensors


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are in memory already; transformers' loading threads would only scatter copies over their heaps."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_filled(where: str, parameters: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint) -> None:
    if empty := [name for name, parameter in parameters if parameter.is_meta]:
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor for {empty[0]} of {where}"
            f"{f' and {len(empty) - 1} more' if len(empty) > 1 else ''}; the checkpoint is incomplete."
        )


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
