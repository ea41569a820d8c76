"""A JSON file as a dataclass, every value checked against the annotation of its field; nothing is converted but
integers to floats. Keys that the dataclass does not have are left to whoever wrote them."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from qronos_export.errors import ReportError

T = TypeVar("T")


def load(path: Path) -> Any:
    """The document in `path`. Raises ReportError where it cannot be read or holds what JSON has no numbers for."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error) or "it is nested too deep"
        raise ReportError(f"{path} cannot be read as JSON: {why}.") from error


def typed(kind: type[T], data: Any, where: str) -> T:
    """`data` as the dataclass `kind`. `where` names it in errors. Raises ReportError for what does not fit."""
    return cast(T, _checked(kind, data, where))


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _checked(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise _misfit(value, "an object", where)
        hints = get_type_hints(kind)
        known = {}
        for field in fields(kind):
            if field.name in value:
                known[field.name] = _checked(hints[field.name], value[field.name], f"{where}: {field.name}")
            elif field.default is MISSING and field.default_factory is MISSING:
                raise ReportError(f"{where} has no {field.name!r}; it is damaged, or was written by another version.")
        return cast(Any, kind)(**known)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _checked(kind, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _misfit(value, "a list", where)
        return [_checked(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _misfit(value, "an object", where)
        return {key: _checked(arguments[1], each, f"{where}: {key}") for key, each in value.items()}
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _misfit(value, {float: "a finite number", int: "an integer", str: "a string"}.get(kind, str(kind)), where)
    return value


def _misfit(value: Any, expected: str, where: str) -> ReportError:
    return ReportError(f"{where} is {value!r:.60}; expected {expected}.")
