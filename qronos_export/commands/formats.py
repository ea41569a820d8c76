"""`qronos-export formats`."""

from __future__ import annotations

import typer

from qronos_export.commands.options import console


def formats() -> None:
    """The support matrix."""
    from rich.table import Table

    from formats import FORMATS
    from formats.compiled import how

    table = Table("format", "bits per weight", "block", "bytes a block", "how", box=None, pad_edge=False)
    for fmt in FORMATS.values():
        methods = "kept as it is" if fmt.is_float else "rtn, gpfq, gptq, gptaq, qronos"
        if fmt.ggml_type is None:
            methods = "no GGUF type; ONNX or torch"
        table.add_row(fmt.name, f"{fmt.bits_per_weight:g}", str(fmt.block_size), str(fmt.block_bytes), methods)
    console().print(table)
    typer.echo(f"\nScales on the CPU are searched by: {how()}")
