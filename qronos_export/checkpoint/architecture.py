"""A causal language model of transformers before it has weights, and what is where in it."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qronos_export.errors import CheckpointError

from .meta import parameters_on_meta
from .quiet import quiet
from .source import Checkpoint


class Architecture:
    """`model` in eval mode, without gradients and without a key-value cache, all of its parameters on the meta device;
    its decoder `blocks` and their names in it."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Raises CheckpointError where transformers has no causal language model for it."""
        with quiet(), parameters_on_meta():
            self.model = _from_config(_config(checkpoint), checkpoint, dtype)
        self.model.eval().requires_grad_(False)
        self.blocks = _decoder_blocks(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        self.block_names = [names[block] for block in self.blocks]

    @property
    def embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def head(self) -> nn.Linear | None:
        return cast(nn.Linear | None, self.model.get_output_embeddings())

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.head is not None and self.head.weight is self.embedding.weight


def _config(checkpoint: Checkpoint) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
    )
    config.get_text_config().use_cache = False
    return config


def _from_config(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} is a {config.model_type!r}, which transformers does not run as a causal language "
            f"model: {error}"
        ) from error


def _decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no list of {depth} decoder blocks; this layout is not supported."
    )
