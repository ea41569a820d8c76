"""Numbers of an ONNX model in a file beside it: written one after another, read back without loading the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

from qronos_export.errors import ArtifactError

_INLINE = 1024  # bytes up to which an initializer stays in the model itself
_ALIGNMENT = 64
_NUMPYS = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8,
    TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64,
)  # fmt: skip


class DataFile:
    """The data file of a model on its way; its name goes into every initializer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def put(
        self, name: str, numbers: np.ndarray | Tensor, dims: Sequence[int] | None = None, kind: int | None = None
    ) -> TensorProto:
        """Write `numbers` and return the initializer `name` for them; with `dims` and `kind` where ONNX reads their
        bytes as numbers of another type (two of 4 bits in each)."""
        array = np.asarray(numbers.numpy() if isinstance(numbers, Tensor) else numbers, order="C")
        tensor = TensorProto(name=name, dims=array.shape if dims is None else dims)
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        if array.nbytes <= _INLINE:
            tensor.raw_data = array.tobytes()
            return tensor
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", self._file.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(array.reshape(-1).view(np.uint8).data)  # tofile would pass over what a full disk drops
        return tensor


def renamed(tensor: TensorProto, name: str, dims: Sequence[int]) -> TensorProto:
    """Another initializer of the same bytes, which are not written again."""
    other = TensorProto()
    other.CopyFrom(tensor)
    other.name = name
    del other.dims[:]
    other.dims.extend(dims)
    return other


def read(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The numbers of an initializer of a model in `folder`; large ones are mapped. Types numpy lacks come as bytes.

    Raises ArtifactError where the file beside the model is missing or too short.
    """
    packed = tensor.data_type not in _NUMPYS
    dtype = np.dtype(np.uint8) if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = (-1,) if packed else tuple(tensor.dims)
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.frombuffer(tensor.raw_data, dtype).copy() if packed else onnx.numpy_helper.to_array(tensor).copy()
    place = {entry.key: entry.value for entry in tensor.external_data}
    check(tensor, folder)
    offset, length = int(place.get("offset", 0)), int(place["length"])
    found = np.memmap(folder / place["location"], dtype, mode="c", offset=offset, shape=(length // dtype.itemsize,))
    return found.reshape(shape)


def check(tensor: TensorProto, folder: Path) -> None:
    """Raises ArtifactError where the numbers of an initializer of a model in `folder` are not where they should be."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place.get("location"):
        raise ArtifactError(f"{tensor.name} of the model in {folder} does not say which file holds it.")
    path = folder / place["location"]
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):  # the Hub's cache has links to files
        raise ArtifactError(
            f"{tensor.name} is to be read from {place['location']}, outside of {folder}; that is refused."
        )
    if not _is_file(path):
        raise ArtifactError(
            f"{path} is missing: it holds the weights of the model beside it. Copy both files together."
        )
    numbers = [place.get(key, "0") for key in ("offset", "length")]
    if not all(number.isdecimal() and len(number) < 20 for number in numbers):
        raise ArtifactError(
            f"{tensor.name} of the model in {folder} lies at {' + '.join(n[:20] for n in numbers)}, which is no place."
        )
    if path.stat().st_size < sum(map(int, numbers)):
        raise ArtifactError(f"{path} ends inside {tensor.name}: the file is truncated. Copy it again.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long to be one
        return False
