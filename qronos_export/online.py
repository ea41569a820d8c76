"""Models that rotate while they run, in both streams, for `evaluate` alone: what they compute stays, what is rounded
changes. Experts are refused. (R3, which only a cache of keys can tell from nothing, is kv_cache's.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qronos_export.checkpoint import Checkpoint, LazyModel
from qronos_export.errors import TransformError
from qronos_export.suspended import is_experts
from qronos_export.transforms.hadamard import random_rotation


def online_model(names: Sequence[str], checkpoint: Checkpoint, device: torch.device | str = "cpu") -> LazyModel:
    """The checkpoint with the online rotations `names`. Raises TransformError where one does not fit it."""
    kind = Rotated if "r4" in names else Incoherent if "quip" in names else LazyModel
    return kind(checkpoint, device)


class Online(LazyModel):
    """A model whose blocks rotate what their layers read or return, and whose weights make up for it."""

    name: str

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        super().__init__(checkpoint, device)
        if any(is_experts(part) for block in self.blocks for part in block.modules()):
            raise TransformError(
                f"online: {self.name} does not fit {checkpoint.name}: it has experts; leave it out: --set online=none."
            )
        for block in self.blocks:
            self.turn(block)

    def load_block(self, index: int) -> nn.Module:
        block = super().load_block(index)
        self.rotate(block)
        return block

    @abstractmethod
    def turn(self, block: nn.Module) -> None:
        """Make `block`, one of the model's or a copy, rotate while it runs."""

    @abstractmethod
    def rotate(self, block: nn.Module) -> None:
        """Change the weights of `block` so that with these rotations it computes what it did without."""


class Rotated(Online):
    """QuaRot's online R4 (arXiv 2404.00456): every `down_proj` reads its input times a Hadamard matrix, and has the
    same in its weight. Outliers of what it reads are spread before they are rounded."""

    name = "r4"

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self._rotations = _Rotations(torch.device(device))
        super().__init__(checkpoint, device)
        if not any(_downs(block) for block in self.blocks):
            raise TransformError(
                f"online: r4 does not fit {checkpoint.name}: it has no down_proj that is a linear layer; leave it out: "
                "--set online=none."
            )

    def turn(self, block: nn.Module) -> None:
        for linear in _downs(block):
            linear.register_forward_pre_hook(lambda _, args: (args[0] @ self._rotations(args[0].shape[-1]),))

    def rotate(self, block: nn.Module) -> None:
        for linear in _downs(block):
            linear.weight.data = linear.weight @ self._rotations(linear.in_features)


class Incoherent(Online):
    """QuIP's two-sided incoherence (arXiv 2307.13304): a linear layer's weight W [out, in] becomes U W Vᵀ with random
    orthogonal matrices, it reads V x, and Uᵀ turns what it returns. One U and V for each size."""

    name = "quip"

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self._u, self._v = _Rotations(torch.device(device), seed=1), _Rotations(torch.device(device))
        self._last: tuple[Tensor, int, Tensor] | None = None  # what was read, its version, and its rotation
        super().__init__(checkpoint, device)

    def turn(self, block: nn.Module) -> None:
        for linear in _linears(block):
            linear.register_forward_pre_hook(lambda _, args: (self._turned(args[0]),))
            linear.register_forward_hook(lambda _, args, output: output @ self._u(output.shape[-1]))

    def rotate(self, block: nn.Module) -> None:
        self._last = None
        for linear in _linears(block):
            u = self._u(linear.out_features)
            linear.weight.data = u @ linear.weight @ self._v(linear.in_features).T
            if linear.bias is not None:
                linear.bias.data = u @ linear.bias

    def _turned(self, x: Tensor) -> Tensor:
        """x Vᵀ [..., in]; one tensor for all layers that read one after another, so that they stay a group."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = x, x._version, x @ self._v(x.shape[-1]).T
        return self._last[2]


class _Rotations:
    """A random orthogonal matrix, float32 [size, size], for each size asked for."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._seed = seed
        self._known: dict[int, Tensor] = {}

    def __call__(self, size: int) -> Tensor:
        if size not in self._known:
            rotation = random_rotation(size, torch.Generator().manual_seed(self._seed))
            self._known[size] = rotation.to(self._device, torch.float32)
        return self._known[size]


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [part for part in block.modules() if isinstance(part, nn.Linear)]


def _downs(block: nn.Module) -> list[nn.Linear]:
    return [part for name, part in block.named_modules() if name.endswith("down_proj") and isinstance(part, nn.Linear)]
