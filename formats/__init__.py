"""Bytes ↔ numbers: the block formats of GGUF files and their relatives, on torch and numpy alone.

`FORMATS` maps a type's name to its `BlockFormat`; it is the support matrix. A format of a known
family goes into that family's module; a new family is a module, and its tuple in the line below.
`IntegerGrid` makes plain integer grids of any bits and group.
"""

from formats import ggml_basic, ggml_codebook, ggml_k, ggml_ternary, microscaling
from formats.block import BlockFormat, FormatError, Grid, QuantizedWeight
from formats.integers import IntegerGrid

_FAMILIES = (ggml_basic, ggml_k, ggml_codebook, microscaling, ggml_ternary)

FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for family in _FAMILIES for fmt in family.FORMATS}

__all__ = ["FORMATS", "BlockFormat", "FormatError", "Grid", "IntegerGrid", "QuantizedWeight"]
