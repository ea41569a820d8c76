"""What a transform is: it changes weights so that the model computes the same and rounds better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qronos_export.transforms.anatomy import Anatomy


@dataclass
class InputStats:
    """What is known of the inputs x of one module in the float model.

    hessian:  XᵀX / n, float32 [features, features].
    largest:  max |x| per feature, float32 [features].
    sample:   some of the inputs, float32 [tokens, features].
    """

    hessian: Tensor
    largest: Tensor
    sample: Tensor


Inputs = Mapping[str, InputStats]
"""By the name of the module they are given to, below the block; empty for a transform that needs none."""


@dataclass(frozen=True)
class Outside:
    """What surrounds the blocks; `head` has a weight of its own."""

    embedding: nn.Embedding
    norm: nn.Module
    head: nn.Linear


class Transform(ABC):
    """One pass over a model: first what is outside of its blocks, then block by block."""

    unties: bool = False
    """Whether embedding and output matrix become different tensors."""
    needs_inputs: bool = False
    """Whether `block` wants statistics of calibration tokens."""

    def outside(self, outside: Outside) -> None:  # noqa: B027  # most transforms leave it alone
        """Change the embedding, the final norm and the head in place."""

    @abstractmethod
    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        """Change a decoder block in place. Raises TransformError where it cannot be done."""
