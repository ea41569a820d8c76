"""What a transform is: it changes weights so that the model computes the same and rounds better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qronos_export.ranks import ALONE, Ranks
from qronos_export.transforms.anatomy import Anatomy


@dataclass(frozen=True)
class Goal:
    """What the weights are changed for.

    format:        of the artifact, which weights will be rounded to: a type's name, a grid's or a mix's.
    seed:          of whatever is drawn at random.
    activations:   what the run rounds the inputs of matrices to, a name of ACTIVATIONS or none.
    spin_steps:    how often SpinQuant moves its rotations.
    compute_dtype: what forwards multiply in, float32 or bfloat16.
    ranks:         who else searches on the same inputs.
    """

    format: str
    seed: int
    activations: str = "none"
    spin_steps: int = 100
    compute_dtype: str = "float32"
    ranks: Ranks = ALONE


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


@dataclass(frozen=True)
class Whole:
    """A model that is in memory as a whole, free to be changed, and calibration `tokens` int64 [samples, length].

    enter: int64 [sequences, length] → hidden states before the first block, and the keyword arguments of every block.
    leave: the same tokens and what the last block returned → logits, float32 [sequences, length, vocabulary].
    """

    blocks: Sequence[nn.Module]
    anatomies: Sequence[Anatomy]
    tokens: Tensor
    enter: Callable[[Tensor], tuple[Tensor, list[dict[str, Any]]]]
    leave: Callable[[Tensor, Tensor], Tensor]


class Transform(ABC):
    """One pass over a model: first what is outside of its blocks, then block by block."""

    unties: bool = False
    """Whether embedding and output matrix become different tensors."""
    needs_inputs: bool = False
    """Whether `block` wants statistics of calibration tokens."""
    learns: bool = False
    """Whether `learn` comes first, which takes memory for the whole model."""

    def learn(self, whole: Whole, on_progress: Callable[[int, int], None]) -> None:  # noqa: B027  # few do
        """Find out what `outside` and `block` will do. `on_progress(done, total)` is called after every step.

        Raises TransformError where it cannot be done, before the first step if that can be told.
        """

    def outside(self, outside: Outside) -> None:  # noqa: B027  # most transforms leave it alone
        """Change the embedding, the final norm and the head in place."""

    @abstractmethod
    def block(self, anatomy: Anatomy, inputs: Inputs) -> None:
        """Change a decoder block in place. Raises TransformError where it cannot be done."""
