"""Gates: what they read, what they refuse, and what they say to continuous integration."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from qronos_export import gate_report
from qronos_export.cli import app
from qronos_export.errors import OutputError, UsageError
from qronos_export.gate import load_gates
from qronos_export.paired import Chunks
from qronos_export.validation import Gate, Validation, Verdict

LOSS, KL, SAME = [2.0, 2.2, 2.4, 2.2], [0.10, 0.20, 0.30, 0.20], [90.0, 80.0, 70.0, 80.0]


def measured(**changes: Any) -> Validation:
    found = Validation(
        perplexity=math.exp(2.2), perplexity_error=0.1, perplexity_reference=8.0, perplexity_reference_error=0.1,
        kl_divergence=0.2, kl_divergence_error=0.02, kl_median=0.1, kl_99=1.5, kl_max=3.0, same_top=80.0,
        same_top_error=1.0, rms_delta_p=5.0, context=64, chunks=4, text_sha256="ab" * 32, llama_cpp="b11549",
        per_chunk=Chunks(LOSS, KL, SAME),
    )  # fmt: skip
    return replace(found, **changes)


def worse(by: list[float]) -> Validation:
    """In divergence, chunk by chunk."""
    kl = [each + more for each, more in zip(KL, by, strict=True)]
    return measured(kl_divergence=sum(kl) / 4, per_chunk=Chunks(LOSS, kl, SAME))


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    def write(before: Validation | None = None, /, **lines: Any) -> Path:
        if before is not None:
            (tmp_path / "baseline.json").write_text(json.dumps(before.to_json()))
            lines["baseline"] = "baseline.json"
        path = tmp_path / "gate.yaml"
        path.write_text(yaml.safe_dump(lines))
        return path

    return write


def outcomes(verdicts: list[Verdict]) -> dict[str, bool]:
    return {each.limit: each.passed for each in verdicts}


def test_each_limit_has_a_verdict_and_is_inclusive(gate: Any) -> None:
    at = {
        "max_kld": 0.2,
        "max_kl_median": "1e-1",
        "max_kl_99": 1.5,
        "max_kl_max": 3,
        "min_same_top": 80,
        "max_rms_delta_p": 5,
    }
    assert outcomes(load_gates(gate(**at)).verdicts(measured())) == dict.fromkeys(at, True)
    within = {name: float(limit) * (1.001 if name.startswith("min_") else 0.999) for name, limit in at.items()}
    missed = load_gates(gate(**within)).verdicts(measured())
    assert outcomes(missed) == dict.fromkeys(at, False)
    says = {each.limit: each.says for each in missed}
    assert says["min_same_top"] == "The share of same top tokens 80 % is below min_same_top 80.08 %."
    assert says["max_kld"] == "KL divergence 0.2 is above --max-kld 0.1998."
    assert outcomes(Gate(min_same_top=1).verdicts(measured(same_top=math.nan))) == {"min_same_top": False}


def test_options_win_over_the_file(gate: Any) -> None:
    assert load_gates(gate(max_kld=0.1, min_same_top=50), max_kld=0.3, max_ppl_increase=None).limits == Gate(
        max_kld=0.3, min_same_top=50
    )


def test_a_baseline_allows_its_ratio_and_standard_errors(gate: Any) -> None:
    """0.01 ± 0.02/√3 · 1/2: the four chunks are worse by −0.01, 0.03, −0.01 and 0.03."""
    chance, real = worse([-0.01, 0.03, -0.01, 0.03]), worse([0.01, 0.0101, 0.01, 0.0101])
    error = 0.02 / math.sqrt(3)
    for file, limit, passed in (
        (measured(), {"sigmas": 0}, True),
        (chance, {"sigmas": 0.01 / error + 1e-6}, True),
        (chance, {"sigmas": 0.01 / error - 1e-6}, False),
        (real, {}, False),  # as large, but in every chunk
        (real, {"ratio": 1.2}, True),
        (worse([-0.05] * 4), {"ratio": 0.8, "sigmas": 3}, True),
        (worse([-0.01] * 4), {"ratio": 0.5, "sigmas": 0}, False),
    ):
        (verdict,) = load_gates(gate(measured(), kld=limit)).verdicts(file)
        assert verdict.passed is passed, verdict
    assert "KL divergence 0.1" in verdict.says and "0.5 × the baseline's 0.2" in verdict.says


def test_perplexity_and_same_top_have_baselines_too(gate: Any) -> None:
    file = measured(
        perplexity=math.exp(2.3), same_top=76.0,
        per_chunk=Chunks([each + 0.1 for each in LOSS], KL, [0.95 * each for each in SAME]),
    )  # fmt: skip

    def passes(**lines: Any) -> bool:
        return all(outcomes(load_gates(gate(measured(), **lines)).verdicts(file)).values())

    assert passes(ppl={"ratio": math.exp(0.1) + 1e-9, "sigmas": 0}) and not passes(ppl={"ratio": 1.1})
    assert passes(same_top={"ratio": 0.9499, "sigmas": 0}) and not passes(same_top={"ratio": 0.96, "sigmas": 0.1})


def test_another_text_or_model_is_refused(gate: Any) -> None:
    gates = load_gates(gate(measured(), kld={}))
    for change, says in (
        ({"text_sha256": "cd" * 32}, "measured on the text with sha256 abab.*, this file on cdcd"),
        ({"context": 128}, "a context of 64, this file on 128"),
        ({"chunks": 5}, "chunks: 4, this file on 5"),
        ({"perplexity_reference": 8.2}, "float model of perplexity 8, this file against one of 8.2: another model"),
    ):
        with pytest.raises(UsageError, match=says):
            gates.verdicts(measured(**change))


def test_what_cannot_fit_is_refused_before_it_is_measured(gate: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("held out")
    before = measured(text_sha256=hashlib.sha256(b"held out").hexdigest())
    path, junit = gate(before, kld={}), tmp_path / "junit.xml"
    gates = load_gates(path)
    for fitting in ((text, 64, 4), (text, 64, None), (text, 64, 5), (None, 64, 4)):  # 5: the text may have 4
        gates.check_fits(*fitting)
    load_gates(gate(max_kld=1)).check_fits(text, 1, 1)
    path = gate(before, kld={})
    junit.write_text("of an earlier run")
    for more, says in (
        (("--context", "32"), "a context of 64, this file on 32"),
        (("--context", "64", "--chunks", "3"), "chunks: 4, this file on 3"),
    ):
        arguments = ["validate", "a.gguf", "--reference", "b", "--text", str(text), "--gate", str(path), *more]
        error = CliRunner().invoke(app, [*arguments, "--junit", str(junit)]).exception
        assert isinstance(error, UsageError) and says in str(error)
        suites = ElementTree.parse(junit).getroot()
        assert [suites.get(key) for key in ("tests", "failures", "errors")] == ["1", "0", "1"]
        assert says in str(suites.find("testsuite/testcase/error").get("message"))  # type: ignore[union-attr]
    text.write_text("another")
    with pytest.raises(UsageError, match="measured on the text with sha256"):
        gates.check_fits(text, 64, 4)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({}, "has no limit"),
        ({"max_kl": 1}, "unknown key 'max_kl'; a gate has max_kl_99"),
        ({"max_kld": -1}, "max_kld is -1; expected a number that is finite and not negative"),
        ({"max_kld": "much"}, "max_kld is 'much'"),
        ({"max_kld": True}, "max_kld is True"),
        ({"min_same_top": None}, "min_same_top is None"),
        ({"kld": {}}, "kld is against a baseline and none is named; give --baseline"),
        ({"baseline": "baseline.json"}, "a baseline without a limit against it"),
        ({"baseline": 3, "kld": {}}, "baseline is 3; expected the path"),
        ({"baseline": "baseline.json", "kld": 1.05}, r"kld is 1.05; expected \{ratio: 1.05, sigmas: 3\}"),
        ({"baseline": "baseline.json", "kld": {"sigma": 1}}, "kld is {'sigma': 1}"),
        ({"baseline": "baseline.json", "kld": {"ratio": 0}}, "ratio is 0; expected a number above"),
        ({"baseline": "baseline.json", "kld": {}}, r"baseline .*baseline\.json cannot be read"),
    ],
)
def test_what_is_no_gate_is_refused(gate: Any, lines: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_gates(gate(**lines))


def test_a_file_that_is_no_gate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read as a gate"):
        load_gates(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- max_kld\n")
    with pytest.raises(UsageError, match="is not a gate"):
        load_gates(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "lacks what is compared"),
        ('{"kl_divergence": 1}', "'per_chunk'.*make it with `qronos-export validate"),
        ('{"artifacts": [{}, {}]}', "a report of 2 files; store `validate --json` of one of them"),
        ('{"artifacts": [{}], "validation": null}', "lacks what is compared"),
        (json.dumps(measured(chunks=3).to_json()), "a finite number for each of its 3 chunks"),
        (json.dumps(measured(kl_divergence=math.nan).to_json()), "a finite number for each"),
    ],
)
def test_what_is_no_baseline_is_refused(gate: Any, content: str, says: str) -> None:
    path = gate(measured(), kld={})
    path.with_name("baseline.json").write_text(content)
    with pytest.raises(UsageError, match=says):
        load_gates(path)


def test_a_report_of_one_file_is_a_baseline_and_an_option_wins(gate: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"schema": 1, "artifacts": [{}], "validation": measured(kl_divergence=0.7).to_json()}))
    found = load_gates(gate(measured(), kld={}), baseline=report).baseline
    assert found is not None and found.kl_divergence == 0.7 and found.path == report


def test_junit_is_xml_whatever_the_file_is_called() -> None:
    file = Path('a<b>&"\x07\udc80é.gguf')
    verdicts = [Verdict("max_kld", True, "fine"), Verdict("min_same_top", False, "1 < 2 & more")]
    suites = ElementTree.fromstring(gate_report.junit(file, verdicts, 1.25).encode())
    (suite,) = suites
    assert (suites.tag, suite.tag, suite.get("name")) == ("testsuites", "testsuite", 'a<b>&"\ufffd\ufffdé.gguf')
    assert [suite.get(key) for key in ("tests", "failures", "errors", "time")] == ["2", "1", "0", "1.250"]
    passed, failed = suite.findall("testcase")
    assert (passed.get("name"), list(passed)) == ("max_kld", [])
    assert failed.get("name") == "min_same_top" and failed.find("failure").get("message") == "1 < 2 & more"  # type: ignore[union-attr]


def test_the_summary_says_what_was_missed() -> None:
    verdicts = Gate(max_kld=0.1, min_same_top=50).verdicts(measured())
    text = gate_report.markdown(Path("a|b_c.gguf"), measured(), verdicts)
    assert text.startswith("### a\\|b\\_c.gguf: 1 of 2 limits missed\n")
    assert "| `max_kld` | **missed** | KL divergence 0.2 is above --max-kld 0.1. |\n" in text
    assert "| `min_same_top` | kept |" in text and "0.20000 ± 0.02000" in text and "4 chunks of 64 tokens" in text
    assert gate_report.markdown(Path("x"), measured(), []).startswith("### x: measured\n")


def test_githubs_summary_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    with pytest.raises(UsageError, match="needs GITHUB_STEP_SUMMARY"):
        gate_report.summary_file("github")
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    gate_report.append(gate_report.summary_file("github"), "after\n")
    assert path.read_text() == "before\nafter\n"


def test_files_for_ci_are_whole_or_absent(tmp_path: Path) -> None:
    gate_report.check_folder(tmp_path / "x.xml", "--junit")
    gate_report.write(tmp_path / "x.xml", "x")
    with pytest.raises(UsageError, match=r"--junit .*expected the name of a file in a folder that exists"):
        gate_report.check_folder(tmp_path / "absent" / "x.xml", "--junit")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Cannot write"):
        gate_report.write(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.xml"]
