"""A recipe: everything that decides the bytes of a quantized file. Frozen, complete, round-trips through YAML."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qronos_export.errors import UsageError

METHODS = ("qronos", "gptaq", "gptq", "ldlq", "gpfq", "rtn")
TRANSFORMS = ("hadamard", "hadamard-r2", "smoothquant", "awq", "aqas", "equalize", "permute")
ACTIVATIONS = ("none", "q8_0", "q8_k", "int8", "int4", "mxfp4", "mxfp8")
ORDERS = ("natural", "descending", "blocks")


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how. The defaults are measured ones: docs/measurements.md.

    model:            folder with config.json and safetensors, hub id, float .gguf, or `demo`.
    format:           types or mixes by llama.cpp's names, comma separated, e.g. Q4_0 or Q4_0,Q4_K_M; a file for each.
    overrides:        globs of GGUF tensor names -> type; the first that fits counts.
    output_type, embedding_type: type of the output matrix and of the token embedding; None leaves them to llama.cpp.
    pure:             one type for all tensors instead of llama.cpp's mix.
    transforms:       done to the weights before, in this order, comma separated: hadamard, hadamard-r2, smoothquant,
                      awq, aqas, equalize, permute; none, or auto: equalize where something is calibrated and it fits.
    activations:      what the quantized stream rounds the inputs of its matrices to: none, q8_0 or q8_k as llama.cpp's
                      kernels do, or for `evaluate` alone int8, int4, mxfp4, mxfp8.
    online:           r4 rotates what `down` reads while the model runs, for `evaluate` alone; or none.
    method:           qronos, gptaq, gptq, ldlq (QuIP's name for gptq), gpfq or rtn.
    damping:          α in λ = α · mean(diag H).
    shrinkage:        β in G_β = H + β(G − H): how far the measured mismatch of the two streams is trusted.
    magr:             MagR's α: how much of the weights' extremes is given up before they are rounded; 0 is none.
    order:            natural, descending (by diag H, scales fixed beforehand), or blocks: blocks with heavy inputs
                      first, in them heavy columns; in natural and blocks the scales follow the diffused weights.
    calibration:      a text file, `hf:NAME[:CONFIG[:SPLIT]]`, or `self` for text sampled from the model.
    samples, sequence_length: calibration tokens = samples × sequence_length.
    match_lengths:    a file of prompts whose median length sequence_length becomes, with samples for as many tokens.
    micro_batch:      sequences run at a time.
    """

    model: str
    format: str = "Q4_0"
    overrides: dict[str, str] = field(default_factory=dict)
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    transforms: str = "auto"
    activations: str = "none"
    online: str = "none"
    method: str = "qronos"
    damping: float = 3e-2
    shrinkage: float = 0.5
    magr: float = 0.0
    order: str = "blocks"
    calibration: str = "self"
    samples: int = 128
    sequence_length: int = 512
    match_lengths: str | None = None
    seed: int = 0
    micro_batch: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        if not all(self.formats) or len(set(self.formats)) < len(self.formats):
            raise UsageError(f"format is {self.format!r}; expected names such as Q4_0 or Q4_0,Q4_K_M, each once.")
        _one_of("method", self.method, METHODS)
        if self.transforms not in ("none", "auto"):
            for name in self.transform_names:
                _one_of("transforms", name, TRANSFORMS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("online", self.online, ("none", "r4"))
        _one_of("order", self.order, ORDERS)
        for name in ("samples", "sequence_length", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping is {self.damping}; expected a number ≥ 0, typically 1e-6 … 1e-1.")
        if not (math.isfinite(self.magr) and self.magr >= 0):
            raise UsageError(f"magr is {self.magr}; expected a number ≥ 0, typically 1e-3 … 1e-1.")
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"shrinkage is {self.shrinkage}; expected a number from 0 (GPTQ) to 1 (trust fully).")

    @property
    def formats(self) -> list[str]:
        return [name.strip().upper() for name in self.format.split(",")]

    @property
    def transform_names(self) -> list[str]:
        """What `transforms` comes to."""
        if self.transforms == "auto":
            return [] if self.method == "rtn" else ["equalize"]
        return [] if self.transforms == "none" else [name.strip() for name in self.transforms.split(",")]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))


_SHIPPED = Path(__file__).with_name("recipes")


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def load_recipe(source: Path | str, /, **overrides: Any) -> Recipe:
    """The recipe of a shipped name, in a YAML file, or the one in a run's report.json; `overrides` win.

    Raises UsageError naming unknown or ill-typed keys.
    """
    import yaml

    path = Path(source)
    path = path if path.exists() else shipped().get(str(source), path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no recipe {source}: no such file, nor one of {', '.join(shipped())}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a recipe: expected `key: value` lines, such as `format: Q4_0`.")
    if "schema" in data and isinstance(data.get("recipe"), dict):
        data = data["recipe"]
    return recipe_from({**data, **overrides}, str(path))


def plain_value(text: str) -> Any:
    """A setting as YAML reads it: `3` is a number, `Q4_0` a string. Raises UsageError for what is no YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r} cannot be read as the value of a setting: {error}") from error


def recipe_from(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data, e.g. a report's `recipe`. `where` names the data in errors."""
    types = {field.name: field.type for field in fields(Recipe)}
    if unknown := sorted(set(data) - set(types)):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; a recipe has {', '.join(types)}.")
    if "model" not in data:
        raise UsageError(f"{where} names no model; give MODEL on the command line or add `model: …`.")
    checked: dict[str, Any] = {}
    for key, value in data.items():
        wanted = str(types[key])
        if wanted == "float" and not isinstance(value, bool):
            with contextlib.suppress(ValueError, TypeError):  # to YAML 1e-2 is a string
                value = float(value)
        if not _fits(value, wanted):
            raise UsageError(f"{where}: {key} is {value!r}; expected {wanted}.")
        checked[key] = value
    return Recipe(**checked)


def _fits(value: Any, wanted: str) -> bool:
    """Whether `value` is of the type a field of Recipe is annotated with."""
    if wanted == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
    if wanted.endswith(" | None") and value is None:
        return True
    return type(value).__name__ == wanted.removesuffix(" | None")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
