"""Gates as YAML files: limits, and limits against a baseline that was measured before on the same chunks.

    max_kld: 0.1                      # any of validation.Gate's
    min_same_top: 85
    baseline: baseline.json           # what `validate --json` printed; relative to this file
    kld: {ratio: 1.05, sigmas: 3}     # at most 1.05 × the baseline's, or so little more that it may be chance
    ppl: {ratio: 1.01}                # sigmas is 3 unless said otherwise, ratio 1
    same_top: {ratio: 0.99}           # at least

Against a baseline the difference is taken chunk by chunk, and its standard error with it: see paired.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qronos_export.errors import UsageError
from qronos_export.paired import Chunks, Difference, difference
from qronos_export.validation import Gate, Validation, Verdict

_SAME_REFERENCE = 1e-2  # relative; CPUs differ by 1e-3 in the perplexity of one file, other models by more than this


@dataclass(frozen=True)
class Against:
    """A limit of `ratio` times the baseline's value, which may be missed by `sigmas` standard errors."""

    ratio: float = 1.0
    sigmas: float = 3.0


@dataclass(frozen=True)
class Baseline:
    """An earlier validation; of the report's keys those that are needed."""

    path: Path
    text_sha256: str
    context: int
    chunks: int
    perplexity: float
    perplexity_reference: float
    kl_divergence: float
    same_top: float
    per_chunk: Chunks


@dataclass(frozen=True)
class Gates:
    """`limits`, and limits `against` a `baseline` by name: kld, ppl, same_top."""

    limits: Gate = field(default_factory=Gate)
    against: dict[str, Against] = field(default_factory=dict)
    baseline: Baseline | None = None

    @property
    def names(self) -> list[str]:
        """Of all limits there are."""
        absolute = [each.name for each in fields(Gate) if getattr(self.limits, each.name) is not None]
        return [*absolute, *self.against]

    def check_fits(self, text: Path | None, context: int, chunks: int | None) -> None:
        """Raises UsageError where it is known before measuring that the baseline was measured on something else."""
        if self.baseline is None:
            return
        sha256 = hashlib.sha256(text.read_bytes()).hexdigest() if text is not None and text.is_file() else None
        _check_equal(self.baseline, {"text_sha256": sha256, "context": context})
        if chunks is not None and chunks < self.baseline.chunks:  # of a short text there are fewer than asked for
            _check_equal(self.baseline, {"chunks": chunks})

    def verdicts(self, validation: Validation) -> list[Verdict]:
        """One for each limit. Raises UsageError where the baseline was not measured on what `validation` was."""
        found = self.limits.verdicts(validation)
        if self.baseline is not None:
            _check_same(validation, self.baseline)
            found += [_verdict(name, limit, validation, self.baseline) for name, limit in self.against.items()]
        return found


def load_gates(path: Path | None, baseline: Path | None = None, **limits: float | None) -> Gates:
    """The gates in the YAML file `path`, if any; `baseline` and `limits` that are not None win over the file's.

    Raises UsageError for what is no gate, names no limit, or has a baseline that cannot be read.
    """
    data = {} if path is None else _read_yaml(path)
    where = path or "The command line"
    absolute = {each.name for each in fields(Gate)}
    if unknown := sorted(set(map(str, data)) - absolute - set(_AGAINST) - {"baseline"}):
        known = ", ".join([*sorted(absolute), "baseline", *_AGAINST])
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; a gate has {known}.")
    named = data.get("baseline")
    if not isinstance(named, str | None):
        raise UsageError(f"{where}: baseline is {named!r}; expected the path of a file that `validate --json` printed.")
    if baseline is None and named is not None and path is not None:
        baseline = path.parent / named
    gate = Gate(**{name: _number(data[name], f"{where}: {name}") for name in absolute & set(data)})
    gate = replace(gate, **{name: limit for name, limit in limits.items() if limit is not None})
    against = {name: _against(data[name], f"{where}: {name}") for name in _AGAINST if name in data}
    if against and baseline is None:
        raise UsageError(f"{where}: {next(iter(against))} is against a baseline and none is named; give --baseline.")
    if baseline is not None and not against:
        raise UsageError(f"{where}: a baseline without a limit against it; add for example `kld: {{ratio: 1.05}}`.")
    found = Gates(gate, against, None if baseline is None else read_baseline(baseline))
    if path is not None and not found.names:
        raise UsageError(f"{path} has no limit; add for example `max_kld: 0.1`.")
    return found


def read_baseline(path: Path) -> Baseline:
    """What `validate --json` printed, or a run's report.json with one validated file. Raises UsageError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"The baseline {path} cannot be read: {error}") from error
    if isinstance(data, dict) and isinstance(artifacts := data.get("artifacts"), list):
        if len(artifacts) != 1:
            raise UsageError(
                f"The baseline {path} is a report of {len(artifacts)} files; store `validate --json` of one of them."
            )
        data = data.get("validation")
    try:
        per_chunk = Chunks(**{each.name: list(map(float, data["per_chunk"][each.name])) for each in fields(Chunks)})
        counts = {name: int(data[name]) for name in ("context", "chunks")}
        names = ("perplexity", "perplexity_reference", "kl_divergence", "same_top")
        values = {name: float(data[name]) for name in names}
        found = Baseline(path, str(data["text_sha256"]), **counts, **values, per_chunk=per_chunk)  # type: ignore[arg-type]
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"The baseline {path} lacks what is compared ({error}); make it with `qronos-export validate … --json`."
        ) from error
    series = [per_chunk.loss, per_chunk.kl_divergence, per_chunk.same_top]
    numbers = [*values.values(), *(value for each in series for value in each)]
    if any(len(each) != found.chunks for each in series) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"The baseline {path} does not have a finite number for each of its {found.chunks} chunks.")
    return found


def _check_equal(baseline: Baseline, ours: dict[str, Any]) -> None:
    """None is not known."""
    for name, value in ours.items():
        if value is not None and value != (theirs := getattr(baseline, name)):
            raise UsageError(
                f"The baseline {baseline.path} was measured on {_MEASURED_ON[name]} {theirs}, this file on {value}. "
                "Give the same --text, --context and --chunks as then, or make the baseline again."
            )


def _check_same(validation: Validation, baseline: Baseline) -> None:
    if validation.per_chunk is None:
        raise UsageError("A limit against a baseline needs what was measured chunk by chunk; validate the file again.")
    _check_equal(baseline, {name: getattr(validation, name) for name in _MEASURED_ON})
    if abs(validation.perplexity_reference / baseline.perplexity_reference - 1) > _SAME_REFERENCE:
        raise UsageError(
            f"The baseline {baseline.path} was measured against a float model of perplexity "
            f"{baseline.perplexity_reference:.6g}, this file against one of {validation.perplexity_reference:.6g}: "
            "another model. Give the same --reference, or make the baseline again."
        )


def _verdict(name: str, limit: Against, validation: Validation, baseline: Baseline) -> Verdict:
    assert validation.per_chunk is not None  # see _check_same
    ours, theirs, ratio = validation.per_chunk, baseline.per_chunk, limit.ratio
    if name == "kld":
        what, value, before, unit = "KL divergence", validation.kl_divergence, baseline.kl_divergence, ""
        worse = difference(ours.kl_divergence, [ratio * each for each in theirs.kl_divergence])
    elif name == "ppl":
        what, value, before, unit = "Perplexity", validation.perplexity, baseline.perplexity, ""
        logs = difference(ours.loss, [each + math.log(ratio) for each in theirs.loss])
        worse = Difference(before * ratio * math.expm1(logs.mean), before * ratio * logs.error, logs.p)
    else:
        what, value, before, unit = "The share of same top tokens", validation.same_top, baseline.same_top, " %"
        worse = difference([ratio * each for each in theirs.same_top], ours.same_top)
    passed = worse.mean <= limit.sigmas * worse.error
    relation = "worse" if worse.mean > 0 else "better"
    return Verdict(
        name,
        passed,
        f"{what} {value:.6g}{unit} {'keeps' if passed else 'misses'} {ratio:g} × the baseline's {before:.6g}{unit}: "
        f"it is {relation} than that by {abs(worse.mean):.2g} ± {worse.error:.2g}{unit}; "
        f"{limit.sigmas:g} standard errors are allowed.",
    )


_MEASURED_ON = {"text_sha256": "the text with sha256", "context": "a context of", "chunks": "chunks:"}
_AGAINST = ("kld", "ppl", "same_top")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a gate: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a gate: expected `key: value` lines, such as `max_kld: 0.1`.")
    return data


def _against(value: Any, where: str) -> Against:
    known = [each.name for each in fields(Against)]
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise UsageError(f"{where} is {value!r}; expected {{ratio: 1.05, sigmas: 3}}.")
    found = Against(**{key: _number(number, f"{where}: {key}") for key, number in value.items()})
    if found.ratio <= 0:
        raise UsageError(f"{where}: ratio is 0; expected a number above, 1 for no worse than the baseline.")
    return found


def _number(value: Any, where: str) -> float:
    """YAML has 1e-2 as a string."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{where} is {value!r}; expected a number that is finite and not negative.")
    return number
