"""Looks into model files, anyone's and hostile ones: GGUF and ONNX.

Nothing in them is executed, and nothing is believed before it is compared with the file's size.
"""

from __future__ import annotations

from pathlib import Path

from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.errors import ArtifactError, UsageError
from qronos_export.inspection.found import Finding, Inspection
from qronos_export.inspection.gguf_model import inspect_gguf


def inspect(path: Path, *, numbers: bool, check: bool) -> Inspection:
    """What `path`, a GGUF, an .onnx or a folder with one, holds. `numbers`: statistics of every tensor's, which reads
    all of the file; `check`: what is wrong with it.

    Raises UsageError where there is no such file, ArtifactError where it is neither or nothing of it can be read.
    """
    if path.is_dir() or path.suffix == ".onnx":
        check_packages()  # without which not even what follows can be imported
        from qronos_export.inspection.onnx_model import inspect_onnx

        return inspect_onnx(path, numbers=numbers, check=check)
    if not path.is_file():
        raise UsageError(f"{path} is no file; give a .gguf, an .onnx or a folder with model.onnx.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise ArtifactError(f"{path} is neither GGUF, whose first bytes would say so, nor named .onnx.")
    return inspect_gguf(path, numbers=numbers, check=check)


__all__ = ["Finding", "Inspection", "inspect"]
