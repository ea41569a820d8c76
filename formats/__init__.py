"""Bytes ↔ numbers: the block formats of GGUF files and their relatives, on torch and numpy alone.

`FORMATS` maps a type's name to its `BlockFormat`; it is the support matrix. A format of a known
family goes into that family's module; a new family is a module, and its tuple in the line below.
`IntegerGrid`, `DenormalGrid` and `TernaryGrid` make plain grids of any group; `find_format` knows them by name, too.
"""

import re

from formats import ggml_basic, ggml_codebook, ggml_k, ggml_ternary, microscaling
from formats.block import BlockFormat, FormatError, Grid, QuantizedWeight
from formats.integers import DenormalGrid, IntegerGrid, TernaryGrid

_FAMILIES = (ggml_basic, ggml_k, ggml_codebook, microscaling, ggml_ternary)

FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for family in _FAMILIES for fmt in family.FORMATS}


def find_format(name: str, columns: int) -> BlockFormat:
    """The format `name` for rows of `columns` weights: a key of FORMATS, or INT4_G128, UINT3_G64, DINT4, TERNARY, …,
    where UINT has a zero point and a missing group is the whole row. Raises FormatError for any other name."""
    if name in FORMATS:
        return FORMATS[name]
    plain = re.fullmatch(r"(?:([UD]?)INT([2348])|TERNARY)(?:_G(\d+))?", name)
    if plain is None:
        raise FormatError(f"there is no format {name}; there are {', '.join(FORMATS)}, and grids such as INT4_G128")
    kind, bits, given = plain.groups()
    group = int(given) if given else columns
    if not bits:
        return TernaryGrid(group)
    return DenormalGrid(int(bits), group) if kind == "D" else IntegerGrid(int(bits), group, symmetric=kind != "U")


__all__ = [
    "FORMATS",
    "BlockFormat",
    "DenormalGrid",
    "FormatError",
    "Grid",
    "IntegerGrid",
    "QuantizedWeight",
    "TernaryGrid",
    "find_format",
]
