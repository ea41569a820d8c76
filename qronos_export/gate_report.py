"""Verdicts of a gate for continuous integration: JUnit's XML, and Markdown for a job's summary."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from qronos_export.errors import OutputError, UsageError
from qronos_export.validation import Validation, Verdict

GITHUB = "github"
VARIABLE = "GITHUB_STEP_SUMMARY"


def junit(file: Path, verdicts: Sequence[Verdict], seconds: float) -> str:
    """One test case for each verdict; `seconds` is what measuring took."""
    failures = sum(not verdict.passed for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "time": f"{seconds:.3f}"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _legal(file.name), **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": _legal(file.name), "name": verdict.limit})
        if not verdict.passed:
            ElementTree.SubElement(case, "failure", {"message": _legal(verdict.says)})
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def junit_error(file: Path, error: str, seconds: float) -> str:
    """Where nothing could be measured: one test case, with an error."""
    counts = {"tests": "1", "failures": "0", "errors": "1", "time": f"{seconds:.3f}"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _legal(file.name), **counts})
    case = ElementTree.SubElement(suite, "testcase", {"classname": _legal(file.name), "name": "validate"})
    ElementTree.SubElement(case, "error", {"message": _legal(error)})
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def markdown(file: Path, validation: Validation, verdicts: Sequence[Verdict]) -> str:
    """A heading, what was measured, and a line for each limit."""
    failed = sum(not verdict.passed for verdict in verdicts)
    outcome = f"{failed} of {len(verdicts)} limits missed" if failed else "passed" if verdicts else "measured"
    v = validation
    lines = [
        f"### {_cell(_legal(file.name))}: {outcome}",
        "",
        "| perplexity | of the float model | KL divergence | same top token |",
        "|---:|---:|---:|---:|",
        f"| {v.perplexity:.4f} ± {v.perplexity_error:.4f} | {v.perplexity_reference:.4f} "
        f"({v.perplexity_increase:+.2f} %) | {v.kl_divergence:.5f} ± {v.kl_divergence_error:.5f} "
        f"| {v.same_top:.2f} ± {v.same_top_error:.2f} % |",
        "",
    ]
    if verdicts:
        lines += ["| limit | | |", "|---|---|---|"]
        lines += [f"| `{each.limit}` | {'kept' if each.passed else '**missed**'} | {each.says} |" for each in verdicts]
        lines.append("")
    lines.append(f"{v.chunks} chunks of {v.context} tokens, text {v.text_sha256[:12]}, {v.runtime}")
    return "\n".join(lines) + "\n"


def summary_file(given: str) -> Path:
    """Where --summary goes: a file, or for `github` the one GitHub names. Raises UsageError where it names none."""
    if given != GITHUB:
        return Path(given)
    if not (named := os.environ.get(VARIABLE)):
        raise UsageError(f"--summary github needs {VARIABLE}, which GitHub sets in a job's steps; give a file instead.")
    return Path(named)


def check_folder(path: Path, option: str) -> None:
    """Raises UsageError where a file could not be written at `path`, before anything is measured for it."""
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{option} {path}: expected the name of a file in a folder that exists.")


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises OutputError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """After what other steps of the job wrote there. Raises OutputError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error


def _legal(text: str) -> str:
    """Without what XML 1.0 has no characters for; a file's name may have any."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _cell(text: str) -> str:
    """As it is, whatever Markdown or HTML would make of it."""
    return re.sub(r"([\\`*_{}\[\]<>#|&!~])", r"\\\1", " ".join(text.split()))
