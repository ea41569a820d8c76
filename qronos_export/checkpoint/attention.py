"""Attention on keys and values that were rounded, as a cache of few bits would give them back.

transformers' models hand queries, keys (after RoPE) and values to a function that their config names. An attention
gets a config of its own that names ours, which rounds and calls the one that was named before. So no architecture needs
code; attention that keeps something else than keys and values of heads, or asks no such function, is refused.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qronos_export.errors import UsageError

from .lazy import LazyModel
from .quiet import quiet
from .source import Checkpoint

_NAME = "qronos_export_rounded"
Rounding = Callable[[Tensor], Tensor]


def attention_windows(checkpoint: Checkpoint) -> list[int | None]:
    """How many of the last tokens each layer attends to; None: all."""
    with quiet():
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def head_sizes(model: LazyModel) -> frozenset[int]:
    """Numbers in a key of every attention of `model`.

    Raises UsageError where keys and values cannot be rounded: naming the first module, or a model without attention.
    """
    sizes = set()
    for block, name in zip(model.blocks, model.block_names, strict=True):
        for part_name, part in _attentions(block):
            size = getattr(part, "head_dim", None)
            if not isinstance(size, int) or _function(part) is None:
                raise UsageError(
                    f"kv_cache does not fit {model.checkpoint.name}: {name}.{part_name}, a {type(part).__name__}, does "
                    "not keep keys and values of heads as other models do. Leave kv_cache out."
                )
            sizes.add(size)
    if not sizes:
        raise UsageError(
            f"kv_cache does not fit {model.checkpoint.name}: no part of its decoder blocks asks transformers for its "
            "attention function. Leave kv_cache out."
        )
    return frozenset(sizes)


def round_cache(block: nn.Module, keys: Rounding, values: Rounding) -> None:
    """Have every attention of `block` attend to rounded keys and values, float [sequences, heads, length, head size].
    Masks are made by the model, whose config stays."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    for _, part in _attentions(block):
        attention: Any = part
        attention.rounded_cache = _function(attention), keys, values
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = _NAME


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    attend, keys, values = module.rounded_cache
    return attend(module, query, keys(key), values(value), *args, **kwargs)


def _attentions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in block.named_modules():
        if "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(part).forward).__code__.co_names:
            yield name, part


def _function(attention: Any) -> Callable[..., Any] | None:
    """The function `attention` asks now; eager ones are beside the class."""
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
