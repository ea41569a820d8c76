"""The page about runs: made of tiny real runs, with everything in it and nothing outside it; the worst tokens."""

from __future__ import annotations

import base64
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llamacpp_tests.test_families import read_scores
from qronos_export import log_probabilities, pipeline
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.checkpoint import continued, open_checkpoint, tokenizer
from qronos_export.cli import app
from qronos_export.errors import LlamaCppError, OutputError, QronosError, ReportError, UsageError
from qronos_export.llamacpp import LlamaCpp
from qronos_export.log_probabilities import LogProbabilities
from qronos_export.proof import Held
from qronos_export.recipe import Recipe
from qronos_export.report import read_report
from qronos_export.runs import compare, printable, read_baseline, read_baselines, read_runs, stored_tensors
from qronos_export.validation import Cache, Reference
from qronos_export.worst import worst_tokens
from tests.families import make

CONTEXT, CHUNKS = 64, 4
VOID = {"meta", "link", "img", "source", "br", "hr", "input", "col", "area", "base", "embed", "track", "wbr"}


@dataclass(frozen=True)
class Made:
    """Two runs of one model, the second without validation, and a baseline's file of numbers."""

    model: Path
    first: Path
    second: Path
    baseline: Path


@pytest.fixture(scope="module")
def made(llamacpp: LlamaCpp, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("runs")
    model = make("llama", folder / "tiny")

    def run(name: str, held: Held | None, **settings: Any) -> Path:
        recipe = Recipe(
            str(model), calibration=str(english), samples=4, sequence_length=64, device="cpu", transforms="none",
            attention_aware=False, **settings,
        )  # fmt: skip
        list(pipeline.run(recipe, folder / name, llamacpp=llamacpp, held=held))
        return folder / name

    first = run("first", Held(english, CONTEXT, CHUNKS), format="Q4_0,Q8_0")
    second = run("second", None, format="Q4_K_M", method="rtn")
    theirs = llamacpp.quantize(
        llamacpp.convert(model, folder / "float.gguf", "f32"), folder / "theirs.gguf", "Q4_0", options=["--pure"]
    )
    printed = CliRunner().invoke(
        app,
        ["validate", str(theirs), "--reference", str(folder / "float.gguf"), "--text", str(english), "--json",
         "--context", str(CONTEXT), "--chunks", str(CHUNKS)],
    )  # fmt: skip
    size = {"name": "llama-quantize", "bytes": theirs.stat().st_size, "bits": GGUFFile(theirs).bits_per_weight}
    baseline = folder / "baseline.json"
    baseline.write_text(json.dumps({**json.loads(printed.output), **size}))
    return Made(model, first, second, baseline)


def report(*arguments: object) -> list[Path]:
    """What the command says it wrote; what it raises."""
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return [Path(line) for line in done.output.splitlines() if line.endswith((".html", ".png"))]


@dataclass
class Page(HTMLParser):
    """A page taken apart; refuses elements that are not closed in turn."""

    path: Path
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""
    numbers: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "data":
            self.numbers.append((float(self.tags[-1][1]["value"]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["data"]:
            self.numbers[-1] = (self.numbers[-1][0], data)
        if "style" not in self._open:
            self.text += data

    def of(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.tags if name == tag)


def numbers_in(value: object) -> Iterator[float]:
    """But those of single chunks: they pair files, for `compare` and gates."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key != "per_chunk":
                yield from numbers_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings_in(each)
    elif isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def written(made: Made, english: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """By the command, with everything it can have in it."""
    return report(
        made.first, made.second, "--output", tmp_path_factory.mktemp("page"), "--baseline", made.baseline,
        "--worst", made.model, "--text", english, "--context", CONTEXT, "--chunks", CHUNKS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(written: list[Path]) -> Page:
    return Page(written[0])


# ---- the page


def test_everything_of_the_reports_is_in_it(page: Page, made: Made) -> None:
    """Exactly as a value, rounded as text."""
    reports = [json.loads((folder / "report.json").read_text()) for folder in (made.first, made.second)]
    baseline = json.loads(made.baseline.read_text())
    there = {value for value, _ in page.numbers}
    assert {float(value) for value in numbers_in([*reports, baseline])} <= there
    for value, shown in page.numbers:
        plain = shown.replace(",", "")
        decimals = len(plain.partition(".")[2]) if "." in plain and "e" not in plain else 0
        assert abs(float(plain) - value) <= max(0.5 * 10.0**-decimals, 5e-3 * abs(value)) * 1.001
    assert {printable(text) for text in strings_in(reports) if text not in page.text} == set()
    assert baseline["name"] in page.text and "(baseline)" in page.text


def test_it_needs_nothing_else_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [a["src"] for a in page.of("img")] + [a["srcset"] for a in page.of("source")]
    assert len(sources) == 2 * len(list(page.of("picture"))) > 0
    assert {a["href"][1:] for a in page.of("a")} <= {a["id"] for a in page.of("h2")}
    assert "url(" not in page.path.read_text() and "@import" not in page.path.read_text()
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        for element in ElementTree.fromstring(base64.b64decode(content)).iter():
            assert not element.tag.endswith(("script", "image", "foreignObject", "}text"))
            assert all(v.startswith("#") for name, v in element.attrib.items() if name.endswith("href"))


def test_it_can_be_read_aloud(page: Page) -> None:
    assert all(a["alt"] for a in page.of("img"))
    assert all(a.get("scope") in ("col", "row") for a in page.of("th"))
    assert len(list(page.of("thead"))) == len(list(page.of("table")))
    headings = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert headings[0] == 1 and all(b <= a + 1 for a, b in pairwise(headings))


def test_pictures_lie_beside_it(written: list[Path]) -> None:
    names = {path.name for path in written}
    assert names == {path.name for path in written[0].parent.iterdir()}
    assert names == {
        "report.html", "divergence.png", "errors-1.png", "errors-2.png", "bytes-1.png", "bytes-2.png", "seconds-1.png",
        "seconds-2.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in written[1:])


def test_without_validation_it_says_so_and_lies_with_the_run(made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.second, tmp_path / "run"))
    written = report(run)
    assert {path.name for path in written} == {"report.html", "errors.png", "bytes.png", "seconds.png"}
    page = Page(run / "report.html")
    assert "No file was validated" in page.text
    (run / "tiny-Q4_K_M.gguf").unlink()
    with pytest.raises(OutputError, match=r"report\.html exists already.*--force"):
        report(run)
    before = {path.name: path.read_bytes() for path in written}
    assert {path.name: path.read_bytes() for path in report(run, "--force")}.items() & before.items() == {
        (name, content) for name, content in before.items() if not name.startswith(("report", "bytes"))
    }
    assert "tiny-Q4_K_M.gguf: is not in the folder any more" in Page(run / "report.html").text


HOSTILE = (
    "</td><script>alert(1)</script>\"'><img src=x onerror=a> {{ 7 * 7 }} $\\frac{ &amp; \u202e\x00\x1b[2J \ud800 漢 ﷽"
)


def test_hostile_names_are_text(made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.first, tmp_path / "run"))
    data = json.loads((run / "report.json").read_text())
    data["model"] |= {"name": HOSTILE, "source": HOSTILE, "revision": HOSTILE}
    data["notes"] = [HOSTILE]
    data["recipe"][HOSTILE] = [HOSTILE, {HOSTILE: HOSTILE}]
    data["versions"][HOSTILE] = HOSTILE
    data["seconds"][HOSTILE] = 1.0
    data["artifacts"][0]["format"] = HOSTILE
    data["kept"] = [{"artifact": HOSTILE, "tensor": HOSTILE, "type": HOSTILE, "why": HOSTILE}]
    data["layers"][1] |= dict.fromkeys(("artifact", "name", "format", "method", "note"), HOSTILE)
    data["layers"][2]["tensor"] = f"blk.0.{HOSTILE}"
    (run / "report.json").write_text(json.dumps(data))
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(json.loads(made.baseline.read_text()) | {"name": HOSTILE}))
    page = Page(report(run, "--baseline", baseline, "--output", tmp_path / "page")[0])
    test_it_needs_nothing_else_and_runs_nothing(page)
    assert page.text.count(printable(HOSTILE)) > 12
    assert "{{ 7 * 7 }}" in page.text and "\x00" not in page.text and "\x1b" not in page.text


# ---- what is compared


def test_comparisons_and_frontier(made: Made) -> None:
    runs = read_runs([made.first, made.second])
    (found,) = compare(runs, [(made.baseline, read_baseline(made.baseline))])
    labels = {file.label: file for file in found.files}
    assert set(labels) == {"Q4_0", "Q8_0", "llama-quantize"}
    # Theirs has the embedding and the head in Q4_0, too: fewer bits. Each of the three has fewer bits or diverges less.
    assert labels["llama-quantize"].bits < labels["Q4_0"].bits < labels["Q8_0"].bits
    assert [file.label for file in found.frontier] == ["llama-quantize", "Q4_0", "Q8_0"]
    found.files.remove(labels["Q8_0"])
    found.files.append(labels["Q8_0"].__class__("bad", None, 1, 99.0, labels["Q4_0"].validation))
    assert [file.label for file in found.frontier] == ["llama-quantize", "Q4_0"]


def test_a_comparison_is_baselines_but_for_the_runs_own_files(made: Made, tmp_path: Path) -> None:
    runs = read_runs([made.first])
    one = read_baseline(made.baseline)
    own = runs[0].report.artifacts[0]
    files = [
        {"file": name, "bytes": size, "bits_per_weight": one.bits, "validation": one.validation.to_json()}
        for name, size in ((one.label, one.bytes), (own.path, own.bytes))
    ]
    compared = tmp_path / "compared.json"
    compared.write_text(json.dumps({"files": files, "pairs": []}))
    assert read_baselines(compared, runs) == [one] == read_baselines(made.baseline, runs)
    page = Page(report(made.first, "--baseline", compared, "--output", tmp_path / "page")[0])
    assert page.text.count("(baseline)") == 1
    compared.write_text(json.dumps({"files": [{"file": "x"}]}))
    with pytest.raises(ReportError, match=r"files\[0\] has no 'bytes'"):
        read_baselines(compared, runs)


def test_bytes_add_up(made: Made) -> None:
    for file in made.first.glob("*.gguf"):
        parts = stored_tensors(file)
        assert sum(part.bytes for part in parts) == file.stat().st_size
        tensors = GGUFFile(file).tensors
        assert sum(part.tensors for part in parts) == len(tensors)
        named = {(part.kind, part.type): part for part in parts}
        kind = tensors["blk.0.attn_q.weight"].type
        assert named["attn_q", kind].weights == 2 * 128 * 64


def changed(source: Path, place: Path, change: Callable[[Any], Any]) -> Path:
    data = json.loads(source.read_text())
    change(data)
    place.write_text(json.dumps(data))
    return place


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.clear(), "is not the report of a run"),
        (lambda d: d.update(schema=99), "has schema 99; this version reads 1"),
        (lambda d: d.pop("recipe"), "has no 'recipe'"),
        (lambda d: d["artifacts"][0].update(bytes="many"), r"artifacts\[0\]: bytes is 'many'; expected an integer"),
        (lambda d: d["artifacts"][0].update(bytes=True), r"bytes is True; expected an integer"),
        (lambda d: d["artifacts"][0].update(bytes=5), "has 2.* bytes and its report.json says 5"),
        (lambda d: d["artifacts"][0].update(path="../a.gguf"), r"names an artifact '\.\./a\.gguf'"),
        (lambda d: d["artifacts"][0]["validation"].pop("kl_max"), "validation has no 'kl_max'"),
        (lambda d: d["artifacts"][0]["validation"].update(kl_divergence=1e999), "Infinity is no number"),
        (lambda d: d["layers"][3].update(error=[1]), r"layers\[3\]: error is \[1\]; expected a finite number"),
        (lambda d: d.update(layers={}), "layers is {}; expected a list"),
        (lambda d: d.update(model={}), "model has no name"),
        (lambda d: d["seconds"].update(total=10**400), "expected a finite number"),
    ],
)
def test_bad_reports_are_refused(change: Callable[[Any], Any], says: str, made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.first, tmp_path / "run"))
    changed(made.first / "report.json", run / "report.json", change)
    with pytest.raises(ReportError, match=says):
        report(run, "--output", tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("name"), "has no 'name'"),
        (lambda d: d.update(bits=0), "bytes is .* and bits 0; expected numbers above 0"),
        (lambda d: d.update(context=32), "was measured on 4 chunks of 32 tokens .* no run was: 4 of 64"),
        (lambda d: d.update(text_sha256="0"), "Measure it with the same --text"),
        (lambda d: d.update(perplexity_reference=3.5), "perplexity 3.5000; no run was"),
    ],
)
def test_bad_baselines_are_refused(change: Callable[[Any], Any], says: str, made: Made, tmp_path: Path) -> None:
    baseline = changed(made.baseline, tmp_path / "baseline.json", change)
    with pytest.raises(ReportError, match=says):
        report(made.first, "--baseline", baseline, "--output", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_bad_arguments_are_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[" * 100_000)
    wrong: list[tuple[list[object], type[QronosError], str]] = [
        ([tmp_path], ReportError, "cannot be read as JSON"),
        (
            [tmp_path / "absent"],
            ReportError,
            r"absent has no report\.json; give a folder that",
        ),
        ([made.first, made.first], ReportError, "is given twice"),
        ([made.first, "--baseline", tmp_path / "absent"], ReportError, "cannot be read as JSON: No such file"),
        ([made.first, "--worst", "demo", "--context", 2], UsageError, "one chunk of 4 is the least"),
    ]
    for arguments, kind, says in wrong:
        with pytest.raises(kind, match=says):
            report(*arguments, "--output", tmp_path / "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_what_is_written_is_read(made: Made) -> None:
    report = read_report(made.first / "report.json")
    assert report.to_json() == json.loads((made.first / "report.json").read_text())


# ---- worst tokens


@dataclass(frozen=True)
class Kept:
    """The log-probabilities of the float model and of the run's Q4_0."""

    original: Path
    file: Path
    divergence: float
    largest: float


@pytest.fixture(scope="module")
def kept(made: Made, llamacpp: LlamaCpp, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")
    original = made.first.parent / "float.gguf"
    quantized = made.first / "tiny-Q4_0.gguf"
    with Reference(original, english, llamacpp=llamacpp, workspace=folder, context=CONTEXT, chunks=CHUNKS) as reference:
        theirs = llamacpp.kl_divergence(quantized, reference.logits)
        with reference.log_probabilities(quantized, Cache()) as file:
            copies = [Path(shutil.copy(each, folder / name)) for each, name in ((reference.logits, "p"), (file, "q"))]
        assert not file.exists()
    return Kept(*copies, theirs.mean, theirs.maximum)


@pytest.mark.parametrize("at_once", [1, 5000, 1 << 22])
def test_rows_are_what_the_file_says(kept: Kept, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are read at a time."""
    monkeypatch.setattr(log_probabilities, "_AT_ONCE", at_once)
    file, expected = LogProbabilities(kept.file), read_scores(kept.file)
    assert torch.equal(file.tokens, expected.tokens)
    rows = list(file.rows())
    assert max(map(len, rows)) <= max(1, at_once // file.vocabulary)
    assert torch.equal(torch.cat(rows), expected.log_probabilities.flatten(0, 1))


@pytest.mark.parametrize("at_once", [5000, 1 << 22])
def test_the_worst_tokens_are_those_numpy_finds(
    kept: Kept, made: Made, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probabilities, "_AT_ONCE", at_once)
    p, q = (read_scores(path).log_probabilities.numpy().astype(np.float64) for path in (kept.original, kept.file))
    tokens = read_scores(kept.original).tokens.numpy()
    direct = np.where(p > -16, np.exp(p) * (p - q), 0).sum(-1)
    encode = tokenizer(open_checkpoint(str(made.model)))
    found = worst_tokens(LogProbabilities(kept.original), LogProbabilities(kept.file), partial(continued, encode))
    order = np.argsort(-direct, axis=None, kind="stable")[:20]
    assert [token.divergence for token in found.tokens] == pytest.approx(direct.flatten()[order].tolist(), rel=1e-9)
    for token, (chunk, place) in zip(
        found.tokens, zip(*np.unravel_index(order, direct.shape), strict=True), strict=True
    ):
        position = CONTEXT // 2 + 1 + place
        right = int(tokens[chunk, position])
        assert (token.chunk, token.position) == (chunk, position)
        for guess, chosen in (
            (token.right, right),
            (token.of_float, int(p[chunk, place].argmax())),
            (token.of_file, int(q[chunk, place].argmax())),
        ):
            assert guess.in_float == pytest.approx(np.exp(p[chunk, place, chosen]), rel=1e-5)
            assert guess.in_file == pytest.approx(np.exp(q[chunk, place, chosen]), rel=1e-5)
        ids = tokens[chunk, max(0, position - 48) : position + 1].tolist()
        if not token.right.text.startswith("<0x"):
            assert token.before + token.right.text == encode.decode(ids)
    # llama.cpp's own numbers, which it gets from logits that were not rounded to 16 bits.
    assert found.mean == pytest.approx(direct.mean(), rel=1e-9) == pytest.approx(kept.divergence, rel=2e-3)
    assert found.tokens[0].divergence == pytest.approx(kept.largest, rel=1e-2)
    assert found.scored == direct.size == CHUNKS * (CONTEXT // 2 - 1)


def test_the_page_has_them(page: Page, kept: Kept, made: Made) -> None:
    encode = tokenizer(open_checkpoint(str(made.model)))
    found = worst_tokens(LogProbabilities(kept.original), LogProbabilities(kept.file), partial(continued, encode))
    there = {value for value, _ in page.numbers}
    assert len(found.tokens) == 20 and {token.divergence for token in found.tokens} <= there
    assert all(printable(token.before + token.right.text) in page.text for token in found.tokens)


def test_logits_that_are_not_whole_or_not_of_the_same_tokens_are_refused(kept: Kept, tmp_path: Path) -> None:
    content = kept.file.read_bytes()
    short, other = tmp_path / "short", tmp_path / "other"
    for cut in (5, 100, len(content) - 1):
        short.write_bytes(content[:cut])
        with pytest.raises(LlamaCppError, match="is not a whole file of log-probabilities"):
            LogProbabilities(short)
    other.write_bytes(content[:24] + bytes([content[24] ^ 1]) + content[25:])
    with pytest.raises(LlamaCppError, match="are about different tokens"):
        worst_tokens(LogProbabilities(kept.original), LogProbabilities(other), lambda *_: ("", ""))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_in_context_make_the_text_again(family: str, tmp_path: Path) -> None:
    """By sentencepiece and by bytes: with their spaces, and characters of several tokens in one piece."""
    encode = tokenizer(open_checkpoint(str(make(family, tmp_path / "tiny"))))
    text = "The quick  brown fox\n\tsaid: «naïve» 🦊 漢字."
    ids = encode(text, add_special_tokens=False)["input_ids"]
    for index in range(1, len(ids)):
        before, piece = continued(encode, ids[:index], ids[index])
        whole = encode.decode(ids[: index + 1])
        if "�" not in whole:
            assert before + piece == whole and text.startswith(before)
        assert piece and "�" not in piece
    assert continued(encode, ids[:3], len(encode) + 5)[1] == f"[{len(encode) + 5}]"
