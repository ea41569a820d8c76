"""What an attention does with the outputs of its q, k and v, for rounding that looks at both sides (BoA, arXiv
2406.13474; aespa, arXiv 2402.08958): which rows make a head, and A in the cost tr(A ΔW H ΔWᵀ) of their errors.

    q    A = E over pairs (m, n ≤ m) of R_Δᵀ k_n k_nᵀ R_Δ,   Δ = m − n,  k_n the key's projection: (R_m δq)·(R_n k_n);
         less what is the same for all keys that a query meets, which softmax does not see: covariance, not moment
    k    A = Σ over the queries of the group, E of R_Δ q_m q_mᵀ R_Δᵀ
    v    A = Σ over the same heads of W_Oᵀ W_O, W_O the columns of `o` that read the head

R_Δ turns by Δ positions (RoPE). Taking what a token says to be independent of where it stands, E splits into E[k kᵀ] =
W_k H W_kᵀ (with terms of the bias) and a mean over Δ, of which a sequence of n tokens has n − Δ pairs. With R_Δ =
diag(c) + diag(s) P, P swapping the halves, the mean is a sum of four products, entry by entry, with E[ccᵀ], E[csᵀ],
E[scᵀ] and E[ssᵀ]. Where a query meets the last keys only (a sliding window), pairs further apart do not count.

Whether a rotation is all that happens to q and k is read off a forward pass. Where it is not (norms of q and k), their
rows are rounded by H alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qronos_export.errors import UsageError
from qronos_export.rounding import Coupled
from qronos_export.statistics import LayerStats

_UNSEEN = "q and k are rounded by their inputs alone: their attention is not computed in a way we can follow"
_CHANGED = "q and k are rounded by their inputs alone: more than a rotation by position comes before their product"


@dataclass(frozen=True)
class Projection:
    """The q, k or v of an attention: `heads` heads of `size` rows each of the weight of `linear`, from row `start`."""

    name: str
    linear: nn.Linear
    start: int
    heads: int
    size: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.heads * self.size)

    def of(self, output: Tensor) -> Tensor:
        """What it computed, [sequences, heads, length, size], in the linear's `output` [sequences, length, rows]."""
        return output[..., self.rows].unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def moments(self, stats: LayerStats) -> Tensor:
        """E[y yᵀ] of every head's outputs: float32 [heads, size, size]."""
        weight = self.linear.weight[self.rows].detach().float().view(self.heads, self.size, -1)
        second = weight @ stats.hessian @ weight.mT
        if self.linear.bias is None:
            return second
        bias = self.linear.bias[self.rows].detach().float().view(self.heads, self.size, 1)
        mean = self.means(stats)[:, :, None]
        return second + mean @ bias.mT + bias @ (mean - bias).mT

    def means(self, stats: LayerStats) -> Tensor:
        """E[y] of every head's outputs: float32 [heads, size]."""
        bias = self.linear.bias
        mean = self.linear.weight[self.rows].detach().float() @ stats.mean
        return (mean if bias is None else mean + bias[self.rows].detach().float()).view(self.heads, self.size)


@dataclass(frozen=True)
class Rotation:
    """RoPE by positions 0, 1, …: c and s [positions, size] of R = diag(c) + diag(s) P; zeros and ones where it leaves
    a head's last entries alone. A query meets the keys of the last `window` positions, its own among them."""

    cosine: Tensor
    sine: Tensor
    turned: int
    window: int

    @classmethod
    def of(
        cls, embeddings: tuple[Tensor, Tensor] | None, size: int, length: int, device: torch.device | str = "cpu"
    ) -> Rotation:
        """From what transformers gives a block, [sequences, length, turned] each; None turns nothing."""
        cosine, sine = torch.ones(length, size, device=device), torch.zeros(length, size, device=device)
        if embeddings is None:
            return cls(cosine, sine, 0, length)
        turned = embeddings[0].shape[-1]
        cosine[:, :turned], sine[:, :turned] = embeddings[0][0], embeddings[1][0]
        return cls(cosine, sine, turned, length)

    def apply(self, states: Tensor) -> Tensor:
        """[…, positions, size], each turned by its position."""
        return states * self.cosine + self._swapped(states) * self.sine

    def mean(self, moment: Tensor, *, backwards: bool) -> Tensor:
        """The mean over pairs of positions of R_Δ C R_Δᵀ for C = `moment` [size, size], or of R_Δᵀ C R_Δ."""
        c, s = self.cosine, -self.sine if backwards else self.sine
        pairs = torch.arange(len(c), 0, -1, device=c.device)[:, None]
        pairs[self.window :] = 0
        pairs = pairs / pairs.sum()
        right = self._swapped(moment)
        mixed = right * ((c * pairs).T @ s)
        both = self._swapped(right.mT)
        return moment * ((c * pairs).T @ c) + mixed + mixed.mT + both * ((s * pairs).T @ s)

    def common(self, mean: Tensor) -> Tensor:
        """The mean of zzᵀ over pairs of positions (m, n ≤ m), z the mean of R_Δᵀ `mean` [size] over all n that m
        meets."""
        turned = mean * self.cosine - self._swapped(mean.expand_as(self.cosine)) * self.sine
        met = torch.arange(1, len(turned) + 1, device=turned.device)[:, None].clamp(max=self.window)
        total = turned.cumsum(0)
        total[self.window :] = total[self.window - 1]
        return (total / met).T @ total / met.sum()

    def _swapped(self, states: Tensor) -> Tensor:
        """P of each vector: (−second half, first half, the rest, which s leaves out)."""
        half = self.turned // 2
        return torch.cat([-states[..., half : self.turned], states[..., :half], states[..., self.turned :]], dim=-1)


@dataclass(frozen=True)
class Attention:
    """The attention of a block, its weights as they are in the float model. `rotation` is None where q and k are left
    alone, and `note` says why."""

    query: Projection
    key: Projection
    value: Projection
    out: nn.Linear
    rotation: Rotation | None
    note: str

    def coupled(self, name: str, stats: LayerStats) -> list[Coupled]:
        """The heads among the rows of the weight `name`, whose inputs have `stats`."""
        return [
            Coupled(torch.arange(start, start + len(hessian), device=hessian.device), hessian)
            for projection, hessians in ((self.query, self._query), (self.key, self._key), (self.value, self._value))
            if projection.name == name and (self.rotation is not None or projection is self.value)
            for start, hessian in zip(
                range(projection.start, projection.rows.stop, projection.size), hessians(stats), strict=True
            )
        ]

    def note_of(self, name: str) -> str:
        return self.note if name in (self.query.name, self.key.name) else ""

    def _query(self, stats: LayerStats) -> Iterator[Tensor]:
        assert self.rotation is not None
        for moment, mean in zip(self.key.moments(stats), self.key.means(stats), strict=True):
            met = self.rotation.mean(moment, backwards=True) - self.rotation.common(mean)
            yield from [met] * (self.query.heads // self.key.heads)

    def _key(self, stats: LayerStats) -> Iterator[Tensor]:
        assert self.rotation is not None
        for moments in self.query.moments(stats).view(self.key.heads, -1, self.key.size, self.key.size):
            yield self.rotation.mean(moments.sum(0), backwards=False)

    def _value(self, stats: LayerStats) -> Iterator[Tensor]:
        columns = self.out.weight.detach().float().T.view(self.value.heads, -1, self.value.size, len(self.out.weight))
        yield from (columns @ columns.mT).sum(1)


@torch.no_grad()
def read_attention(block: nn.Module, name: str, hidden: Tensor, arguments: dict[str, Any]) -> Attention | None:
    """The attention of the decoder block `name`, from a forward of `hidden` [sequences, length, hidden]; None where
    there is none that we can read."""
    found = next(_found(block, name), None)
    if found is None:
        return None
    query, key, value, out = found
    outputs: dict[nn.Module, Tensor] = {}
    hooks = [
        linear.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
        for linear in {query.linear, key.linear}
    ]
    try:
        with _Products() as seen:
            block(hidden, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    q, k = query.of(outputs[query.linear]), key.of(outputs[key.linear])
    embeddings = arguments.get("position_embeddings")
    for each in (embeddings, None):
        if each is None or (isinstance(each, tuple) and each[0].ndim == 3 and each[0].shape[-1] <= query.size):
            rotation = Rotation.of(each, query.size, hidden.shape[1], hidden.device)
            turned = rotation.apply(q), rotation.apply(k)
            for queries, keys, mask in seen.products:
                if _same(turned[0], queries) and _same(turned[1], keys):
                    window = hidden.shape[1] if mask is None else _window(mask[0, 0])
                    return Attention(query, key, value, out, replace(rotation, window=window), "")
    return Attention(query, key, value, out, None, _CHANGED if seen.products else _UNSEEN)


def check_attention(blocks: Iterable[nn.Module], model: str) -> None:
    """Raises UsageError unless a block has an attention that we can read."""
    if not any(True for block in blocks for _ in _found(block, "")):
        raise UsageError(
            f"attention_aware does not fit {model}: no block has q_proj, k_proj, v_proj (or qkv_proj) and o_proj with "
            "heads of one size. Leave it out."
        )


class _Products(TorchFunctionMode):
    """Keeps queries and keys [sequences, heads, length, size] of every attention computed meanwhile, and its mask
    [sequences, heads, queries, keys] where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            self.products.append((args[0], args[1], mask))
        return func(*args, **(kwargs or {}))


def _window(mask: Tensor) -> int:
    """How many keys, its own and those right before, a query meets by `mask` [queries, keys]: bool, or added to scores.
    All, if that is not what it says."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    positions = torch.arange(len(mask), device=mask.device)
    back, window = positions[:, None] - positions, int(seen[-1].sum())
    return window if torch.equal(seen, (back >= 0) & (back < window)) else len(mask)


def _same(states: Tensor, used: Tensor) -> bool:
    """Whether attention used `states`, one after another or each for several queries."""
    if used.shape[1] % states.shape[1]:
        return False
    used = used[:, :: used.shape[1] // states.shape[1]]
    return used.shape == states.shape and bool((used - states).abs().max() <= 1e-3 * states.abs().max())


def _found(block: nn.Module, name: str) -> Iterator[tuple[Projection, Projection, Projection, nn.Linear]]:
    for part, module in block.named_modules():
        children = dict(module.named_children())
        size, out = getattr(module, "head_dim", 0), children.get("o_proj")
        leaves = ["qkv_proj"] * 3 if "qkv_proj" in children else ["q_proj", "k_proj", "v_proj"]
        linears = [children.get(leaf) for leaf in leaves]
        if not (isinstance(size, int) and size and isinstance(out, nn.Linear)):
            continue
        q, k, v = (linear if isinstance(linear, nn.Linear) else None for linear in linears)
        if q is None or k is None or v is None:
            continue
        queries = out.in_features // size
        keys = (q.out_features - out.in_features) // 2 // size if q is k else k.out_features // size
        starts = [0, queries * size, (queries + keys) * size] if q is k else [0, 0, 0]
        counts = [queries, keys, keys]
        rows = [sum(counts) * size] * 3 if q is k else [count * size for count in counts]
        if keys < 1 or queries % keys or [q.out_features, k.out_features, v.out_features] != rows:
            continue
        projections = [
            Projection(f"{name}.{part}.{leaf}.weight", linear, start, count, size)
            for leaf, linear, start, count in zip(leaves, (q, k, v), starts, counts, strict=True)
        ]
        yield projections[0], projections[1], projections[2], out
