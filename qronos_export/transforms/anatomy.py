"""How the parts of a decoder block are joined: who reads which norm, who writes to the residual stream, which two
matrices hand each other number by number.

Read off a forward pass, not off names of architectures: a weight reads a norm if the tensor it is given is the one the
norm returned. Only v/o and up/down go by the names that transformers gives them in every family. A transform built on a
wrong reading would change the logits; `transformed` compares them and refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qronos_export.errors import TransformError
from qronos_export.suspended import expert_matrices, is_experts


@dataclass(frozen=True)
class Linear:
    """A matrix of a block as views: `weight` [out, in] and `bias` [out], changed in place, computing in the other
    factor's dtype."""

    name: str
    weight: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, stop: int) -> Linear:
        """The part that computes outputs start … stop − 1."""
        return Linear(self.name, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def map_inputs(self, matrix: Tensor) -> None:
        """Read x · matrix where x was: W ← W · matrix, [in, in] orthogonal, or [in] for 1 / its diagonal."""
        wide = self.weight.to(matrix.dtype, copy=True)
        self.weight.copy_(wide * matrix if matrix.ndim == 1 else wide @ matrix)

    def map_outputs(self, matrix: Tensor) -> None:
        """Write y · matrix where y was: W ← matrixᵀ · W, matrix [out, out] or [out] for a diagonal."""
        wide = self.weight.to(matrix.dtype, copy=True)
        self.weight.copy_(wide * matrix[:, None] if matrix.ndim == 1 else matrix.T @ wide)
        if self.bias is not None:
            bias = self.bias.to(matrix.dtype, copy=True)
            self.bias.copy_(bias * matrix if matrix.ndim == 1 else bias @ matrix)


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream and what reads it."""

    name: str
    module: nn.Module
    readers: tuple[Linear, ...]

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def gain(self) -> Tensor:
        """What it multiplies with, float64 [hidden]; some families store the gain less one."""
        return self.weight.double() + self._offset

    def set_gain(self, gain: Tensor) -> None:
        self.weight.copy_(gain - self._offset)

    @property
    def _offset(self) -> float:
        """What it adds to its weight: whether it is silent without weight and bias, on numbers with a mean of zero,
        none of which a LayerNorm takes off."""
        own = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        kept = [tensor.clone() for tensor in own]
        for tensor in own:
            tensor.zero_()
        silent = float(self.module(torch.linspace(-1, 1, len(own[0])).to(own[0])[None]).abs().max()) < 0.5
        for tensor, before in zip(own, kept, strict=True):
            tensor.copy_(before)
        return 0.0 if silent else 1.0

    def fold(self) -> None:
        """Move the gain into the readers, which leaves ones."""
        for reader in self.readers:
            reader.map_inputs(self.gain)
        self.set_gain(torch.ones_like(self.gain))

    @property
    def is_rms(self) -> bool:
        """Whether it only divides by the root mean square: no mean taken off, no bias put on."""
        if self.bias is not None:
            return False
        shifted = 3 + torch.linspace(-1, 1, len(self.weight)).to(self.weight)[None]
        expected = shifted.double() / shifted.double().square().mean().sqrt() * self.gain
        return bool((self.module(shifted).double() - expected).abs().max() < 1e-3 * expected.abs().max())


@dataclass(frozen=True)
class Pair:
    """Two matrices and what goes number by number from the first to the second: rows of `first` may be permuted along
    with the columns of `second`.

    For v/o a head of v serves several heads of o: `copies` [out of first, times] are the columns of `second` per row of
    `first`. `head` is the number of neighbouring rows that may be mixed (v/o), or 1 (up/down: elementwise). `gate` is
    what the outputs of `first` are multiplied with one by one; without it up's go through the activation function.
    """

    kind: str
    first: Linear
    second: Linear
    copies: Tensor
    head: int
    gate: Linear | None = None

    @property
    def is_linear(self) -> bool:
        """Whether a factor of a row of `first` arrives at `second` as it is: gelu and relu² let none pass."""
        return self.kind == "value" or self.gate is not None

    def scale(self, factors: Tensor) -> None:
        """Divide the outputs of `first` by `factors` float64 [out of first], and make up for it in `second`; for pairs
        that are linear."""
        self.first.map_outputs(1 / factors)
        spread = torch.empty(self.second.weight.shape[1], dtype=torch.float64, device=factors.device)
        spread[self.copies] = factors[:, None].expand(self.copies.shape)
        self.second.map_inputs(spread)


@dataclass(frozen=True)
class Anatomy:
    """A decoder block. `loose` names norms of the residual stream's size that no matrix reads: their outputs are added
    to the stream, so a rotation of the stream would have to pass through their gains."""

    norms: tuple[Norm, ...]
    writers: tuple[Linear, ...]
    pairs: tuple[Pair, ...]
    loose: tuple[str, ...]

    def over(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Anatomy:
        """The same parts in other tensors: what is a view of a parameter here is that view of its copy there. Norms'
        own weights stay.

        copies: (parameter, its copy), contiguous, for every parameter that has a part.
        """

        def view(part: Tensor) -> Tensor:
            for parameter, copied in copies:
                start, beyond = divmod(part.data_ptr() - parameter.data_ptr(), part.element_size())
                if not beyond and 0 <= start < parameter.numel():
                    return copied.as_strided(part.shape, part.stride(), start)
            raise KeyError("a part that is of none of the parameters")

        def moved(linear: Linear) -> Linear:
            return Linear(linear.name, view(linear.weight), None if linear.bias is None else view(linear.bias))

        return Anatomy(
            tuple(replace(norm, readers=tuple(map(moved, norm.readers))) for norm in self.norms),
            tuple(map(moved, self.writers)),
            tuple(
                replace(p, first=moved(p.first), second=moved(p.second), gate=None if p.gate is None else moved(p.gate))
                for p in self.pairs
            ),
            self.loose,
        )


@torch.no_grad()
def dissect(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Anatomy:
    """The anatomy of `block`, from one forward of `hidden` [sequences, length, hidden]; weights are views of its own.

    Raises TransformError for a module whose weights are no matrices.
    """
    size = hidden.shape[-1]
    given: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}
    hooks = []
    for name, module in block.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                given.setdefault(name, args[0])
            if isinstance(output, Tensor):
                returned.setdefault(name, output)

        hooks.append(module.register_forward_hook(hook))
    try:
        block(hidden, **arguments)
    finally:
        for each in hooks:
            each.remove()

    modules = dict(block.named_modules())
    is_norm = {n for n in returned if "norm" in type(modules[n]).__name__.lower() and _length(modules[n]) == size}
    readers: dict[str, list[Linear]] = {name: [] for name in is_norm}
    for name, tensor in given.items():
        source = next((n for n in is_norm if n != name and _same(returned[n], tensor)), None)
        if source is not None:
            readers[source] += _matrices(name, modules[name], "up")
    reading = {linear.name for each in readers.values() for linear in each}
    writers = [
        linear
        for name in given
        if is_experts(modules[name]) or getattr(getattr(modules[name], "weight", None), "ndim", 0) == 2
        for linear in _matrices(name, modules[name], "down")
        if linear.weight.shape[0] == size and linear.name not in reading
    ]
    norms = tuple(Norm(n, modules[n], tuple(readers[n])) for n in given if n in is_norm and readers[n])
    loose = tuple(n for n in given if n in is_norm and not readers[n])
    return Anatomy(norms, tuple(writers), tuple(_pairs(block)), loose)


def _same(output: Tensor, used: Tensor) -> bool:
    return output.data_ptr() == used.data_ptr() and output.numel() == used.numel()


def _length(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else 0


def _matrices(name: str, module: nn.Module, stage: str) -> list[Linear]:
    """The matrices that a module applies to its input ("up"), or that make its output ("down")."""
    if is_experts(module):
        bias = getattr(module, "down_proj_bias" if stage == "down" else "gate_up_proj_bias", None)
        return [
            Linear(f"{name}.{leaf}", weight, None if bias is None else bias.detach()[expert])
            for expert, (leaf, weight) in enumerate(expert_matrices(module, stage))
        ]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TransformError(f"{name} is a {type(module).__name__}, whose weights are no matrix we could change")
    return [Linear(name, weight.detach(), None if bias is None else bias.detach())]


def _pairs(block: nn.Module) -> Iterator[Pair]:
    for name, module in block.named_modules():
        parts = {leaf: f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_children()}

        def linear(leaf: str, module: nn.Module = module, parts: dict[str, str] = parts) -> Linear:
            return _matrices(parts[leaf], module.get_submodule(leaf), "up")[0]

        if "o_proj" in parts and ("v_proj" in parts or "qkv_proj" in parts):
            out = linear("o_proj")
            head = getattr(module, "head_dim", 0)
            value = linear("v_proj" if "v_proj" in parts else "qkv_proj")
            if not head or out.weight.shape[1] % head:
                continue  # no attention whose heads all have this size
            heads = out.weight.shape[1] // head
            if "v_proj" not in parts:  # q, k and v in one: v's rows are the last
                kept = (len(value.weight) // head - heads) // 2 * head
                value = value.rows(len(value.weight) - kept, len(value.weight))
            groups = len(value.weight) // head
            if not groups or len(value.weight) % head or heads % groups:
                continue
            columns = torch.arange(heads * head, device=out.weight.device).view(groups, heads // groups, head)
            yield Pair("value", value, out, columns.transpose(1, 2).reshape(groups * head, -1), head)
        elif "down_proj" in parts and ("up_proj" in parts or "gate_up_proj" in parts):
            down = linear("down_proj")
            up = linear("up_proj" if "up_proj" in parts else "gate_up_proj")
            yield _inner(up, down, linear("gate_proj") if "gate_proj" in parts else None)
        elif is_experts(module):
            downs = _matrices(name, module, "down")
            for up, down in zip(_matrices(name, module, "up"), downs, strict=True):
                yield _inner(up, down, None)


def _inner(up: Linear, down: Linear, gate: Linear | None) -> Pair:
    """`up` may hold the gate's rows as well, in front of its own."""
    inner = down.weight.shape[1]
    if len(up.weight) == 2 * inner:
        up, gate = up.rows(inner, 2 * inner), up.rows(0, inner)
    return Pair("inner", up, down, torch.arange(inner, device=down.weight.device)[:, None], 1, gate)
