"""A recipe: everything that decides the bytes of a quantized file. Frozen, complete, round-trips through YAML."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qronos_export.errors import UsageError

METHODS = ("qronos", "gptaq", "gptq", "ldlq", "gpfq", "rtn")
ERROR_DIFFUSION = ("qronos", "gptaq", "gptq", "ldlq")
SWEEPS = (*ERROR_DIFFUSION, "gpfq")
TRANSFORMS = ("hadamard", "hadamard-r2", "spinquant", "smoothquant", "awq", "aqas", "equalize", "permute")
ACTIVATIONS = ("none", "llama.cpp", "q8_0", "q8_k", "int8", "int4", "mxfp4", "mxfp8")
ONLINE = ("r3", "r4", "quip")
CACHES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "int8", "int4")
ARTIFACTS = ("gguf", "onnx", "onnx-js", "onnx-plain", "onnx-mx")
ACCURACY_LEVELS = (0, 4)
DTYPES = ("float32", "bfloat16")
OFFLOADS = ("none", "cpu", "disk")
ORDERS = ("natural", "descending", "blocks", "min_pivot")


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how. The defaults are measured ones: docs/measurements.md.

    model:            folder with config.json and safetensors, hub id, float .gguf, or `demo`.
    format:           types or mixes by llama.cpp's names, comma separated, e.g. Q4_0 or Q4_0,Q4_K_M; a file for each.
    overrides:        globs of GGUF tensor names -> type; the first that fits counts.
    artifact:         what is written, comma separated: gguf, onnx (onnxruntime-genai), onnx-js (transformers.js),
                      onnx-plain (standard operators), onnx-mx (and Microscaling types in ONNX's own); all from one
                      calibration, with the same numbers.
    accuracy_level:   how onnx and onnx-js multiply: 4 with inputs rounded to int8, 0 in float.
    output_type, embedding_type: type of the output matrix and of the token embedding; None leaves them to llama.cpp.
    pure:             one type for all tensors instead of llama.cpp's mix.
    transforms:       done to the weights before, in this order, comma separated: hadamard, hadamard-r2, spinquant,
                      smoothquant, awq, aqas, equalize, permute; none, or auto: equalize where something is calibrated,
                      it fits and no rotation is done online.
    spin_steps:       how often spinquant moves its rotations.
    activations:      what the quantized stream rounds the inputs of its matrices to: none, llama.cpp (for each matrix
                      what its CPU kernel for the type does), q8_0 or q8_k for all alike, or for `evaluate` alone int8,
                      int4, mxfp4, mxfp8.
    kv_cache:         k and v -> types that the quantized stream keeps keys and values in, and that the file is measured
                      with: f16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, or for `evaluate` alone int8, int4. One that is
                      missing is f16; {} rounds neither.
    online:           done while the model runs, for `evaluate` alone, comma separated: r3 rotates keys (needs a
                      kv_cache), r4 what `down` reads, quip inputs and outputs of all linear layers; or none.
    method:           qronos, gptaq, gptq, ldlq (QuIP's name for gptq), gpfq or rtn.
    damping:          α in λ = α · mean(diag H).
    shrinkage:        β in V = W + βW(G − H)(H + ρI)⁻¹: how far the measured mismatch of the two streams is trusted.
    ridge:            ρ / mean(diag H) there; null for ρ = λ, as the paper has it.
    magr:             MagR's α: how much of the weights' extremes is given up before they are rounded; 0 is none.
    held_out:         share of the sequences, one in 2, 3, 4, …, on which λ, and for qronos ρ and β, are chosen for each
                      group of layers, beginning with `damping` and `ridge`; 0 takes them as they are.
    stochastic:       codes are drawn from the two neighbours of a weight, seeded, instead of the nearest.
    refine:           rounds of new scales and coordinate descent on the codes after error diffusion.
    order:            natural, descending (by diag H, scales fixed beforehand), blocks: blocks with heavy inputs
                      first, in them heavy columns, or min_pivot: last what later columns say most about, with blocks
                      kept whole; in all but descending the scales follow the diffused weights.
    attention_aware:  rows of q, k and v one after another, each handing its error to the next rows of its head, weighed
                      by what attention does with them (BoA); None: with method qronos, in models it fits.
    residual_aware:   what writes to the residual stream also makes up for what that is off by already (LoaQ); None:
                      with method qronos, in blocks it fits.
    calibration:      a text file, `hf:NAME[:CONFIG[:SPLIT]]`, or `self` for text sampled from the model.
    samples, sequence_length: calibration tokens = samples × sequence_length.
    match_lengths:    a file of prompts whose median length sequence_length becomes, with samples for as many tokens.
    micro_batch:      sequences run at a time.
    offload:          where hidden states wait between blocks: none (where they are computed), cpu, or disk (in files
                      of the output folder). With the latter two forwards do not wait for one another in memory, either,
                      but are run anew, to the same bytes.
    state_dtype:      what hidden states are offloaded in: float32 or bfloat16.
    compute_dtype:    what forwards multiply in: float32, or bfloat16, which is faster on many processors, and whose
                      noise the files show a little.
    """

    model: str
    format: str = "Q4_0"
    artifact: str = "gguf"
    accuracy_level: int = 4
    overrides: dict[str, str] = field(default_factory=dict)
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    transforms: str = "auto"
    spin_steps: int = 100
    activations: str = "none"
    kv_cache: dict[str, str] = field(default_factory=dict)
    online: str = "none"
    method: str = "qronos"
    damping: float = 3e-2
    shrinkage: float = 1.0
    ridge: float | None = 0.5
    magr: float = 0.0
    held_out: float = 0.0
    stochastic: bool = False
    refine: int = 0
    order: str = "blocks"
    attention_aware: bool | None = None
    residual_aware: bool | None = None
    calibration: str = "self"
    samples: int = 128
    sequence_length: int = 512
    match_lengths: str | None = None
    seed: int = 0
    micro_batch: int = 8
    device: str = "auto"
    compute_dtype: str = "float32"
    offload: str = "none"
    state_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not all(self.formats) or len(set(self.formats)) < len(self.formats):
            raise UsageError(f"format is {self.format!r}; expected names such as Q4_0 or Q4_0,Q4_K_M, each once.")
        for name in self.artifacts:
            _one_of("artifact", name, ARTIFACTS)
        if len(set(self.artifacts)) < len(self.artifacts):
            raise UsageError(f"artifact is {self.artifact!r}; expected each once.")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise UsageError(f"accuracy_level is {self.accuracy_level}; expected 0 (float) or 4 (int8 inputs).")
        if self.accuracy_level == 0 and not {"onnx", "onnx-js"} & set(self.artifacts):
            raise UsageError("accuracy_level is for artifacts onnx and onnx-js; leave it out, or add one of them.")
        _one_of("method", self.method, METHODS)
        if self.transforms not in ("none", "auto"):
            names = self.transform_names
            if "magr" in names:
                raise UsageError("magr is no transform of a whole model but a setting of its own: --magr 0.01, say.")
            for name in names:
                _one_of("transforms", name, TRANSFORMS)
            if len(set(names)) < len(names) or {"hadamard", "spinquant"} <= set(names):
                raise UsageError(
                    f"transforms is {self.transforms!r}; expected each once, and hadamard or spinquant: one rotation."
                )
        _one_of("activations", self.activations, ACTIVATIONS)
        for name in self.online_names:
            _one_of("online", name, ONLINE)
        if len(set(self.online_names)) < len(self.online_names) or {"r4", "quip"} <= set(self.online_names):
            raise UsageError(
                f"online is {self.online!r}; expected each once, and r4 or quip: quip has r4's place, too."
            )
        for which, kind in self.kv_cache.items():
            _one_of("kv_cache: a key", which, ("k", "v"))
            _one_of(f"kv_cache: {which}", kind, CACHES)
        if "r3" in self.online_names and self.kv_cache.get("k", "f16") == "f16":
            raise UsageError(
                "online: r3 rotates keys so that they round better, and nothing rounds them here; add kv_cache: "
                "{k: int4}, or leave r3 out."
            )
        _one_of("order", self.order, ORDERS)
        for name in ("compute_dtype", "state_dtype"):
            _one_of(name, getattr(self, name), DTYPES)
        _one_of("offload", self.offload, OFFLOADS)
        if self.state_dtype != "float32" and self.offload == "none":
            raise UsageError("state_dtype is for hidden states that are offloaded; add offload: cpu or disk.")
        if self.method == "rtn":
            for name, unused in (("compute_dtype", "float32"), ("state_dtype", "float32"), ("offload", "none")):
                if getattr(self, name) != unused and not (name == "compute_dtype" and self.transform_names):
                    raise UsageError(f"{name} is for forwards of calibration, and method rtn has none; leave it out.")
        for name in ("spin_steps", "samples", "sequence_length", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if "spinquant" in self.transform_names and self.sequence_length < 2:
            raise UsageError("spinquant learns from next tokens; sequences of sequence_length 1 have none.")
        if "spinquant" in self.transform_names and "quip" in self.online_names:
            raise UsageError("online: quip rotates what spinquant has learned to rotate; leave one of them out.")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping is {self.damping}; expected a number ≥ 0, typically 1e-6 … 1e-1.")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UsageError(f"ridge is {self.ridge}; expected a number ≥ 0, typically 0.1 … 3, or null.")
        if not (math.isfinite(self.magr) and self.magr >= 0):
            raise UsageError(f"magr is {self.magr}; expected a number ≥ 0, typically 1e-3 … 1e-1.")
        if not 0 <= self.held_out <= 0.5:
            raise UsageError(f"held_out is {self.held_out}; expected a share from 0 to 0.5, typically 0.125.")
        if self.refine < 0:
            raise UsageError(f"refine is {self.refine}; expected a number of rounds ≥ 0.")
        for name, able in (
            ("held_out", ERROR_DIFFUSION), ("refine", ERROR_DIFFUSION), ("attention_aware", ERROR_DIFFUSION),
            ("stochastic", SWEEPS),
        ):  # fmt: skip
            if getattr(self, name) and self.method not in able:
                raise UsageError(f"{name} is for methods {', '.join(able)}; method is {self.method}.")
        if self.attention_aware and "quip" in self.online_names:
            raise UsageError("online: quip mixes the rows of heads, which attention_aware tells apart; leave one out.")
        if self.residual_aware and self.method != "qronos":
            raise UsageError(f"residual_aware is for method qronos; method is {self.method}.")
        if self.residual_aware and "quip" in self.online_names:
            raise UsageError("online: quip turns what residual_aware compares with the stream; leave one out.")
        if self.match_lengths is not None and self.method == "rtn" and not self.transform_names:
            raise UsageError("match_lengths is for calibration text, and method: rtn reads none; leave it out.")
        if self.held_out and self.match_lengths is None and self.samples < self.holds_out_one_in:
            raise UsageError(
                f"held_out: {self.held_out:g} takes one in {self.holds_out_one_in} sequences and there are "
                f"{self.samples}; raise samples."
            )
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"shrinkage is {self.shrinkage}; expected a number from 0 (GPTQ) to 1 (trust fully).")

    @property
    def couples_rows(self) -> bool:
        """What `attention_aware` comes to."""
        fits = self.method == "qronos" and "quip" not in self.online_names
        return fits if self.attention_aware is None else self.attention_aware

    @property
    def corrects_stream(self) -> bool:
        """What `residual_aware` comes to."""
        return self.method == "qronos" and "quip" not in self.online_names and self.residual_aware is not False

    @property
    def holds_out_one_in(self) -> int:
        """What `held_out` comes to: of so many sequences one is held out; 0 for none."""
        return round(1 / self.held_out) if self.held_out else 0

    @property
    def formats(self) -> list[str]:
        return [name.strip().upper() for name in self.format.split(",")]

    @property
    def artifacts(self) -> list[str]:
        return [name.strip().lower() for name in self.artifact.split(",")]

    @property
    def online_names(self) -> list[str]:
        return [] if self.online == "none" else [name.strip() for name in self.online.split(",")]

    @property
    def transform_names(self) -> list[str]:
        """What `transforms` comes to."""
        if self.transforms == "auto":
            return [] if self.method == "rtn" or {"r4", "quip"} & set(self.online_names) else ["equalize"]
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
    path = path if path.is_file() else shipped().get(str(source), path)
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
