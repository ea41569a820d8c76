"""What surrounds a decoder's blocks, and what goes through them: embedding in front, final norm behind, micro-batches
of hidden states with the arguments that the model would give to every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qronos_export.errors import CheckpointError
from qronos_export.memory import ran_out
from qronos_export.states import ON_THE_SPOT, Shelf, States


class MicroBatch:
    """Some sequences on their way: token ids, hidden states of all streams, arguments of every block. Statistics are
    made of those that are `counted`, and apart once more of those that are `held` out to choose by.

    tokens: int64 [sequences, length]
    x:      float [sequences, length, hidden], float stream
    x_hat:  the same of each quantized stream
    """

    def __init__(
        self,
        tokens: Tensor,
        x: Tensor,
        arguments: list[dict[str, Any]],
        *,
        counted: bool = True,
        held: bool = False,
        shelf: Shelf = ON_THE_SPOT,
    ) -> None:
        self.tokens, self.arguments, self.counted, self.held = tokens, arguments, counted, held
        self._x, self.x_hat = States(shelf), States(shelf)
        self._x.append(x)

    @property
    def x(self) -> Tensor:
        return self._x[0]

    @x.setter
    def x(self, states: Tensor) -> None:
        self._x[0] = states


class Decoder:
    """What surrounds the blocks: embedding in front, final norm behind. Runs the model's own forward around stubs."""

    def __init__(self, decoder: nn.Module, blocks: nn.ModuleList) -> None:
        self._decoder = decoder
        self._blocks = blocks

    def enter(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states before the first block, and the keyword arguments the model would give to each block."""
        entered: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def stub(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            entered.append(hidden_states)
            arguments.append(kwargs)
            return hidden_states

        self._around([stub] * len(self._blocks), tokens)
        return entered[0], arguments

    def leave(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads when the last block returned `hidden`: float [sequences, length, hidden]."""

        def stub(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden

        return self._around([stub] * len(self._blocks), tokens)

    def _around(self, stubs: Sequence[Callable[..., Tensor]], tokens: Tensor) -> Tensor:
        for block, stub in zip(self._blocks, stubs, strict=True):
            block.forward = stub
        try:
            output = self._decoder(input_ids=tokens, use_cache=False).last_hidden_state
        except (RuntimeError, AttributeError, TypeError, IndexError) as error:
            if ran_out(error):
                raise
            raise CheckpointError(f"{self._unfit()} ({type(error).__name__}: {error}).") from error
        finally:
            for block in self._blocks:
                del block.forward
        if output.shape[:2] != tokens.shape:
            raise CheckpointError(
                f"{self._unfit()} (got shape {tuple(output.shape)} for tokens {tuple(tokens.shape)})."
            )
        return output

    def _unfit(self) -> str:
        name = type(self._decoder).__name__
        return (
            f"{name} does not pass plain hidden states from block to block; it cannot be calibrated yet, only rtn works"
        )


def enter(
    decoder: Decoder,
    tokens: Sequence[Tensor],
    *,
    counted: bool = True,
    held: bool = False,
    shelf: Shelf = ON_THE_SPOT,
) -> list[MicroBatch]:
    """The float stream in front of the first block, of micro-batches int64 [samples, length]."""
    batches: list[MicroBatch] = []
    for ids in tokens:
        x, arguments = decoder.enter(ids)
        shared = _shared(arguments, batches[0].arguments) if batches else arguments
        batches.append(MicroBatch(ids, x, shared, counted=counted, held=held, shelf=shelf))
    return batches


def add_stream(decoder: Decoder, embedding: nn.Embedding, quantized: Tensor, batches: list[MicroBatch]) -> None:
    """One more quantized stream, from the embedding's stored values `quantized` [vocabulary, hidden]."""
    weight = embedding.weight.data
    embedding.weight.data = quantized
    try:
        for batch in batches:
            batch.x_hat.append(decoder.enter(batch.tokens)[0])
    finally:
        embedding.weight.data = weight


def _shared(new: Any, old: Any) -> Any:
    """`new`, with tensors that equal their counterparts in `old` replaced by these: masks and positions exist once."""
    if isinstance(new, Tensor):
        return old if isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old) else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    if isinstance(new, list | tuple) and isinstance(old, list | tuple) and len(new) == len(old):
        return type(new)(_shared(a, b) for a, b in zip(new, old, strict=True))
    return new


@torch.no_grad()
def advance(module: nn.Module, index: int, batches: list[MicroBatch]) -> None:
    """The float stream alone through decoder block `index`."""
    for batch in batches:
        output = module(batch.x, **batch.arguments[index])
        batch.x = output[0] if isinstance(output, tuple) else output
