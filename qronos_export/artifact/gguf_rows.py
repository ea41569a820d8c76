"""Which rows of a GGUF file are rows of which of our weights: found by content.

A row of a GGUF tensor is one of our float rows, so a hash of each row finds the tensor and the permutation at once,
also through fused or stacked (mixture-of-experts) tensors. There is no name map and no permutation code here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qronos_export.artifact.gguf import CHUNK, GGUFFile, Target
from qronos_export.errors import ArtifactError


def row_hashes(weights: Tensor) -> Tensor:
    """A 64-bit hash of the bits of every row: int64 [rows] for float32 `weights` [rows, columns]."""
    generator = torch.Generator().manual_seed(0x51A05)
    keys = torch.randint(-(2**63), 2**63 - 1, (weights.shape[1],), generator=generator).to(weights.device)
    hashes = [
        ((part + 0.0).contiguous().view(torch.int32).to(torch.int64) * keys).sum(1)  # + 0.0: both zeros hash alike
        for part in weights.split(max(1, CHUNK // weights.shape[1]))
    ]
    return torch.cat(hashes)


def _places(keys: Tensor, wanted: Tensor) -> Tensor | None:
    """For each of `wanted` an entry of the sorted `keys` that equals it, no entry twice; None where that cannot be."""
    ordered, permutation = wanted.sort(stable=True)
    if len(keys) < len(wanted):
        return None
    first, last = torch.searchsorted(keys, ordered), torch.searchsorted(keys, ordered, right=True)
    # The first of equal numbers takes the first of its entries, the second the second.
    nth = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)
    place = first + nth
    if not bool((place < last).all()):
        return None
    return torch.empty_like(place).scatter_(0, permutation, place)


class RowIndex:
    """Finds, for weights of ours, the tensors of a float GGUF file that hold their rows, and in which order."""

    def __init__(self, file: GGUFFile, names: list[str]) -> None:
        """`names`: the tensors that may be matched. Reads them once; keeps 8 bytes a row."""
        self._file = file
        self._hashes = {name: torch.cat([row_hashes(part) for part in file.floats(name)]) for name in names}

    @property
    def unmatched(self) -> list[str]:
        """Tensors that no weight has claimed so far, in file order."""
        return list(self._hashes)

    def leave(self, names: list[str]) -> None:
        """Only `names` are left to be matched."""
        self._hashes = {name: self._hashes[name] for name in names}

    def match(self, weights: Mapping[str, Tensor]) -> list[Target]:
        """Claim every tensor all of whose rows are rows of `weights` (name -> float32 [rows, columns]).

        Of several tensors with the same content (merges that repeat layers) the first unclaimed one is taken.
        """
        names = list(weights)
        hashes = {name: row_hashes(weight).cpu() for name, weight in weights.items()}
        if not hashes:
            return []
        keys = torch.cat(list(hashes.values()))
        owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(h) for h in hashes.values()]))
        row = torch.cat([torch.arange(len(h)) for h in hashes.values()])
        keys, permutation = keys.sort(stable=True)
        owner, row = owner[permutation], row[permutation]
        alone = torch.ones_like(keys, dtype=torch.bool)
        alone[1:] &= keys[1:] != keys[:-1]
        alone[:-1] &= keys[1:] != keys[:-1]
        free = torch.ones_like(alone)
        targets: list[Target] = []
        begins = torch.isin(torch.stack([wanted[0] for wanted in self._hashes.values()]), keys) if self._hashes else ()
        for (tensor, wanted), possible in zip(list(self._hashes.items()), begins, strict=True):
            if not possible:  # nearly all tensors of a deep model
                continue
            # Rows that exist once tell whose tensor this is; of rows that exist several times its own go first.
            owners = owner[alone & torch.isin(keys, wanted)].unique()
            place = None
            for entries in ((free & torch.isin(owner, owners)).nonzero()[:, 0], free.nonzero()[:, 0]):
                if place is None and (found_at := _places(keys[entries], wanted)) is not None:
                    place = entries[found_at]
            if place is None:
                continue
            found = [
                Target(tensor, names[index], row[place[mine]], mine.nonzero()[:, 0])
                for index in owner[place].unique().tolist()
                for mine in [owner[place] == index]
            ]
            self._verify(tensor, found, weights)
            targets += found
            free[place] = False
            del self._hashes[tensor]
        return targets

    def _verify(self, tensor: str, targets: list[Target], weights: Mapping[str, Tensor]) -> None:
        """Hashes only propose; the floats themselves decide."""
        first = 0
        for part in self._file.floats(tensor):
            last = first + len(part)
            for target in targets:
                here = (target.file_rows >= first) & (target.file_rows < last)
                ours = weights[target.source][target.rows[here].to(weights[target.source].device)].cpu()
                if not torch.equal(part[target.file_rows[here] - first], ours):
                    raise ArtifactError(f"rows of {tensor} hash like rows of {target.source} but differ.")
            first = last
