"""Bytes ↔ numbers: the block formats of GGUF files, on torch and numpy alone.

`FORMATS` maps a type's name to its `BlockFormat`; it is the support matrix. A format of a known
family goes into that family's module; a new family is a module, and its tuple in the line below.
"""

from formats import ggml_basic, ggml_k
from formats.block import BlockFormat, FormatError, Grid, QuantizedWeight

FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for fmt in (*ggml_basic.FORMATS, *ggml_k.FORMATS)}

__all__ = ["FORMATS", "BlockFormat", "FormatError", "Grid", "QuantizedWeight"]
