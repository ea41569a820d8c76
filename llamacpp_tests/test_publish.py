"""A run's results on a hub of our own, over real HTTP: the card, the keys in the files, parts, refusals, going on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_parts import part_bytes
from qronos_export.cli import main
from qronos_export.llamacpp import LlamaCpp
from qronos_export.report import sha256
from qronos_export.validation import Reference
from tests.families import make
from tests.hub_server import COMMIT, hub
from tests.upload_server import DROP, TOKEN, Fault, Hub, upload_hub

REPOSITORY = "someone/tiny-GGUF"
BASE_CARD = """---
license: llama3.2
language: [en, de]
pipeline_tag: text-generation
base_model: parents/tiny-base
datasets: [parents/pretraining]
---
# Tiny
"""
BIG = ["tiny-Q8_0.gguf", "tiny-Q4_0.gguf"]

# huggingface_hub's own way of sending a file, of which the library below it disapproves.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def quantized(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` made of a model of the hub."""
    folder = tmp_path_factory.mktemp("published")
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    model = make("llama", folder / "tiny", **shape)
    (model / "README.md").write_text(BASE_CARD)
    (model / "LICENSE").write_text("Do as you like.\n")
    command = ["quantize", "someone/tiny", "-o", folder / "out", "--format", "Q8_0,Q4_0", "--method", "rtn"]
    command += ["--text", english, "--context", "64", "--chunks", "4"]
    with hub({"someone/tiny": model}) as endpoint:
        more = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        subprocess.run([sys.executable, "-m", "qronos_export", *command], env={**os.environ, **more}, check=True)
    return folder / "out"


@pytest.fixture
def results(quantized: Path, tmp_path: Path) -> Path:
    """A copy to be published or damaged."""
    return Path(shutil.copytree(quantized, tmp_path / "out"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with upload_hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state
        assert state.leaked == []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A command's exit code and what it printed, in which no token ever is."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qronos-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert TOKEN not in said.out + said.err
        return int(ended.value.code or 0), said.out, " ".join(said.err.split())

    return call


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ---- what the files and the card say


def test_the_files_say_where_they_come_from(quantized: Path, llamacpp: LlamaCpp, english: Path, tmp_path: Path) -> None:
    """In upstream's keys and ours, of which none belongs to a time or a place; llama.cpp reads the file, and measures
    what it says."""
    file = GGUFFile(quantized / "tiny-Q4_0.gguf")
    assert file.stated("general.license") == "llama3.2" and file.stated("general.languages") == ["en", "de"]
    assert file.stated("general.source.repo_url") == "https://huggingface.co/someone/tiny"
    assert file.stated("general.base_model.0.repo_url") == "https://huggingface.co/parents/tiny-base"
    assert file.stated("qronos_export.model") == f"someone/tiny@{COMMIT}"
    recipe = json.loads(file.stated("qronos_export.recipe"))
    assert (recipe["method"], recipe["format"], recipe["transforms"]) == ("rtn", "Q4_0", "none")
    ours = {key: field.contents() for key, field in file.reader.fields.items() if key.startswith("qronos_export.")}
    measured = {key: ours.pop(key) for key in list(ours) if key.startswith("qronos_export.validation.")}
    assert set(ours) == {f"qronos_export.{key}" for key in ("version", "recipe", "model")}  # rtn reads no text
    artifact = next(each for each in report_of(quantized)["artifacts"] if each["path"] == file.path.name)
    assert measured == {key: artifact["validation"][key.rpartition(".")[2]] for key in measured} and len(measured) == 11
    assert measured["qronos_export.validation.kl_divergence"] > 0
    assert (artifact["sha256"], artifact["bytes"]) == (sha256(file.path), file.path.stat().st_size)
    with Reference(
        llamacpp.convert(quantized.parent / "tiny", tmp_path / "float.gguf", "f32"),
        english,
        llamacpp=llamacpp,
        workspace=tmp_path,
        context=64,
        chunks=4,
    ) as reference:
        again = reference.compare(file.path)  # of the file as it is now
    assert again.kl_divergence == pytest.approx(artifact["validation"]["kl_divergence"], rel=1e-3)
    assert str(quantized.parent) not in json.dumps(ours)
    dump = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--no-tensors", file.path]
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    assert "qronos_export.version" in said and "general.source.repo_url" in said
    assert llamacpp.vocabulary(file.path) == len(file.stated("tokenizer.ggml.tokens"))


@pytest.mark.parametrize("card", ["language: [en, no]", "license: [mit"])
def test_a_card_that_upstream_stumbles_over_costs_its_keys_alone(card: str, llamacpp: LlamaCpp, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "tiny", num_hidden_layers=1)
    plain = llamacpp.convert(model, tmp_path / "plain.gguf", "f32").read_bytes()
    (model / "README.md").write_text(f"---\n{card}\n---\n")
    assert llamacpp.convert(model, tmp_path / "float.gguf", "f32").read_bytes() == plain


def test_the_card_is_the_report_in_words(results: Path, run: Run) -> None:
    code, out, _ = run("card", results, REPOSITORY)
    assert code == 0 and out.strip() == str(results / "README.md")
    card, report = ModelCard.load(results / "README.md"), report_of(results)
    assert card.data.to_dict() == {
        "base_model": "someone/tiny",
        "base_model_relation": "quantized",
        "license": "llama3.2",
        "language": ["en", "de"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "metrics": ["perplexity"],
        "tags": ["gguf", "llama.cpp", "quantized", "rtn", "qronos-export"],
    }
    for artifact in report["artifacts"]:
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| `{artifact['path']}`")]
        found = artifact["validation"]
        assert f"{artifact['bytes']:,}" in row and f"{artifact['bits_per_weight']:.3f}" in row
        assert f"{found['kl_divergence']:.5f} ± {found['kl_divergence_error']:.5f}" in row
        assert artifact["sha256"] in card.text
        assert f"llama-cli --hf-repo {REPOSITORY} --hf-file {artifact['path']}" in card.text
    assert found["text_sha256"] in card.text and f"llama.cpp {found['llama_cpp']}" in card.text
    assert str(results.parent) not in card.text and "on 4 chunks of 64 tokens" in card.text
    assert (results / "LICENSE").read_text() == "Do as you like.\n"
    code, _, err = run("card", results)
    assert code == 1 and "exists already" in err
    assert run("card", results, "--force")[0] == 0
    assert "llama-cli -m tiny-Q8_0.gguf" in (results / "README.md").read_text()


def test_no_license_is_made_up(results: Path, run: Run) -> None:
    report = report_of(results)
    model = {"name": "tiny", "source": "/home/someone/models/tiny", "repository": None, "revision": None}
    recipe = {**report["recipe"], "model": model["source"], "calibration": "/home/someone/texts/mine.txt"}
    (results / "report.json").write_text(json.dumps({**report, "model": model, "recipe": recipe}))
    assert run("card", results)[0] == 0
    card = ModelCard.load(results / "README.md")
    assert {"license", "base_model", "base_model_relation"}.isdisjoint(card.data.to_dict())
    assert "came without a license" in card.text and "/home/someone" not in card.text
    (results / "README.md").unlink()
    terms = {**report, "model": {**model, "license_text": "Mine."}}
    (results / "report.json").write_text(json.dumps(terms))
    assert run("card", results)[0] == 0
    found = ModelCard.load(results / "README.md").data
    assert (found.license, found.license_name, found.license_link) == ("other", "license-of-tiny", "LICENSE")


# ---- sent


def test_all_arrives_in_one_commit(results: Path, server: Hub, run: Run) -> None:
    code, out, err = run("publish", results, REPOSITORY)
    assert code == 0, err
    files = server.branches[REPOSITORY]["main"]
    assert set(files) == {*BIG, "README.md", "LICENSE", "report.json"} and not server.private[REPOSITORY]
    for name in BIG:
        assert files[name] == (results / name).read_bytes()
    assert files["README.md"] == (results / "README.md").read_bytes()
    assert json.loads(files["report.json"])["artifacts"] == report_of(results)["artifacts"]
    assert len(server.sent("/commit/")) == 1 and f"{server.endpoint}/{REPOSITORY}/commit/1" in out
    assert not any(TOKEN in path.read_text(errors="replace") for path in results.iterdir())
    seen = len(server.log)
    assert run("publish", results, REPOSITORY)[0] == 0  # nothing changed: nothing is sent, no empty commit
    assert [line for line in server.log[seen:] if line.startswith("PUT") or "/commit/" in line] == []


def test_a_branch_and_a_private_repository(results: Path, server: Hub, run: Run) -> None:
    assert run("publish", results, REPOSITORY, "--private", "--revision", "v2")[0] == 0
    assert server.private[REPOSITORY] and server.branches[REPOSITORY]["main"] == {}
    assert set(BIG) <= set(server.branches[REPOSITORY]["v2"])
    server.private[REPOSITORY] = False
    code, _, err = run("publish", results, REPOSITORY, "--private")
    assert code == 1 and "exists and is public" in err and server.branches[REPOSITORY]["main"] == {}


def test_a_dry_run_sends_nothing(results: Path, server: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in results.iterdir())
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(results / "no-token"))
    code, out, err = run("publish", results, REPOSITORY, "--dry-run", "--split-size", "1M")
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines()[:-1]][-3:] == ["README.md", "LICENSE", "report.json"]
    assert "tiny-Q8_0-00001-of-0000" in out and "nothing was sent" in out
    assert (server.log, server.branches) == ([], {}) and sorted(path.name for path in results.iterdir()) == before
    code, _, err = run("publish", results, REPOSITORY)
    assert code == 1 and "No token" in err and "hf auth login" in err and server.log == []


def test_large_files_go_in_parts_that_llamacpp_opens(
    results: Path, server: Hub, run: Run, llamacpp: LlamaCpp, english: Path, tmp_path: Path
) -> None:
    code, planned, err = run("publish", results, REPOSITORY, "--split-size", "1M", "--dry-run")
    assert code == 0, err
    code, sent, err = run("publish", results, REPOSITORY, "--split-size", "1M")
    assert code == 0 and sent.splitlines()[:-1] == planned.splitlines()[:-1], err
    files = server.branches[REPOSITORY]["main"]
    listed = {name: int(size.replace(",", "")) for size, name in map(str.split, planned.splitlines()[:-1])}
    assert listed == {name: len(files[name]) for name in listed}
    parts = sorted(name for name in files if name.startswith("tiny-Q8_0-"))
    assert len(parts) >= 3 and parts[0] == f"tiny-Q8_0-00001-of-{len(parts):05}.gguf" and "tiny-Q8_0.gguf" not in files
    assert all(len(files[name]) < 1_300_000 for name in parts)  # tensors of 1 MB, in the first the tokenizer, too
    for name in parts:
        (tmp_path / name).write_bytes(files[name])
    one = llamacpp.perplexity(tmp_path / parts[0], english, context=64, chunks=4)
    assert one == llamacpp.perplexity(results / "tiny-Q8_0.gguf", english, context=64, chunks=4)
    assert parts[0] in files["README.md"].decode() and "--merge" in files["README.md"].decode()
    assert not [path for path in results.iterdir() if path.name.startswith((".", "tiny-Q8_0-"))]
    whole = GGUFFile(results / "tiny-Q8_0.gguf")
    stored = {name: file for part in parts for file in [GGUFFile(tmp_path / part)] for name in file.tensors}
    assert all(np.array_equal(stored[name].bytes(name), whole.bytes(name)) for name in whole.tensors)
    code, _, err = run("publish", results, REPOSITORY, "--split-size", "1K")
    assert code == 2 and "--split-size is '1K'" in err


def test_sizes_of_parts_are_known_before_they_are_written(llamacpp: LlamaCpp, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_token_list(["a", "é", ""])
    writer.add_array("odd.numbers", [1.5, 2.5])
    for name, shape in {"row": (1, 3), "größe": (2, 1, 300_001), "one": (1,), "flat": (1, 1, 290_003)}.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "odd.gguf")
    counts = llamacpp.parts(file.path, 3)
    assert counts == [3, 1]
    written = llamacpp.split(file.path, 3, tmp_path)
    assert part_bytes(file, counts) == [part.stat().st_size for part in written]


def test_without_the_splitter_it_says_so(
    results: Path, server: Hub, run: Run, llamacpp: LlamaCpp, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for tool in llamacpp.bin_folder.iterdir():
        if tool.name != "llama-gguf-split":
            (tmp_path / "bin" / tool.name).symlink_to(tool)
    code, _, err = run("publish", results, REPOSITORY, "--split-size", "1M", "--llamacpp", tmp_path / "bin")
    assert code == 1 and "has no llama-gguf-split" in err and server.log == []


# ---- refused here


def test_what_is_not_proven_stays_here_unless_forced(results: Path, server: Hub, run: Run) -> None:
    found = {each["path"]: each["validation"]["kl_divergence"] for each in report_of(results)["artifacts"]}
    assert found["tiny-Q8_0.gguf"] < found["tiny-Q4_0.gguf"]
    limit = (found["tiny-Q8_0.gguf"] + found["tiny-Q4_0.gguf"]) / 2
    code, _, err = run("publish", results, REPOSITORY, "--max-kld", limit)
    assert code == 1 and "tiny-Q4_0.gguf: KL divergence" in err and "tiny-Q8_0.gguf: KL" not in err
    gate, baseline = results.parent / "gate.yaml", results.parent / "baseline.json"
    baseline.write_text(json.dumps(report_of(results)["artifacts"][0]["validation"]))
    gate.write_text("kld: {ratio: 1.05}\nbaseline: baseline.json\n")
    code, _, err = run("publish", results, REPOSITORY, "--gate", gate)
    assert code == 1 and "tiny-Q4_0.gguf: KL divergence" in err and "misses 1.05 × the baseline's" in err
    assert "tiny-Q8_0.gguf: KL" not in err and server.log == []
    report = report_of(results)
    report["artifacts"][0]["validation"] = None
    (results / "report.json").write_text(json.dumps(report))
    code, _, err = run("publish", results, REPOSITORY)
    assert code == 1 and "tiny-Q8_0.gguf: it was not validated" in err and "--force" in err and server.log == []
    assert run("publish", results, REPOSITORY, "--force")[0] == 0
    assert "not measured" in server.branches[REPOSITORY]["main"]["README.md"].decode()


@pytest.mark.parametrize("value", [None, float("nan"), "low"])
def test_a_validation_that_is_no_number_proves_nothing(value: object, results: Path, server: Hub, run: Run) -> None:
    report = report_of(results)
    report["artifacts"][0]["validation"]["kl_divergence"] = value
    (results / "report.json").write_text(json.dumps(report))
    for command in (("publish", results, REPOSITORY), ("card", results)):
        code, _, err = run(*command)
        assert code == 1 and "validation: kl_divergence is" in err and "expected a finite number" in err
    assert server.log == []


def test_files_that_changed_since_are_refused(results: Path, server: Hub, run: Run) -> None:
    assert run("card", results)[0] == 0
    file = results / "tiny-Q4_0.gguf"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, _, err = run("publish", results, REPOSITORY, "--force")
    assert code == 1 and f"{file} is not what report.json was written for" in err
    report = report_of(results)
    report["artifacts"][1]["sha256"] = sha256(file)
    (results / "report.json").write_text(json.dumps(report))
    code, _, err = run("publish", results, REPOSITORY)  # a card of other files
    assert code == 1 and "README.md does not name the sha256 of tiny-Q4_0.gguf" in err
    file.unlink()
    (results / "README.md").unlink()
    code, _, err = run("publish", results, REPOSITORY)
    assert code == 1 and "tiny-Q4_0.gguf is missing" in err and server.log == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ('{"schema": 9}', "is no report of schema 1"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 1, "artifacts": [], "model": {"name": "x"}, "recipe": {"a": 1}, "versions": {"b": 1}}',
         "lists no files"),
        ('{"schema": 1, "artifacts": [{"path": "../x.gguf", "format": "", "bytes": 1, "bits_per_weight": 1,'
         ' "sha256": ""}], "model": {}}', "no name of something in"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_runs(content: str | None, says: str, tmp_path: Path, run: Run) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    for command in (("card", tmp_path), ("publish", tmp_path, REPOSITORY)):
        code, _, err = run(*command)
        assert code == 1 and says in err
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_people_wrote_goes_as_it_is_if_the_hub_takes_it(results: Path, server: Hub, run: Run) -> None:
    (results / "README.md").write_text("---\nlicense: whatever\n---\n# By hand\n")
    code, _, err = run("publish", results, REPOSITORY)
    assert code == 1 and "license must be one of" in err and server.branches[REPOSITORY]["main"] == {}
    (results / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    assert run("publish", results, REPOSITORY)[0] == 0
    assert server.branches[REPOSITORY]["main"]["README.md"] == b"---\nlicense: mit\n---\n# By hand\n"


def test_a_card_that_was_written_for_another_place_or_other_files_is_refused(
    results: Path, server: Hub, run: Run
) -> None:
    assert run("card", results, "someone/other")[0] == 0
    code, _, err = run("publish", results, REPOSITORY, "--dry-run")
    assert code == 1 and f"says how to run the files of someone/other, not of {REPOSITORY}" in err
    assert run("card", results, REPOSITORY, "--force")[0] == 0
    code, _, err = run("publish", results, REPOSITORY, "--dry-run", "--split-size", "1M")
    assert code == 1 and "another --split-size: tiny-Q4_0-00001-of-0000" in err and server.log == []
    assert run("publish", results, REPOSITORY)[0] == 0


def test_a_name_that_is_no_repository(results: Path, run: Run) -> None:
    for name in ("tiny", "a/b/c", "someone/tiny@main"):
        code, _, err = run("publish", results, name)
        assert code == 2 and "expected OWNER/NAME" in err


# ---- refused there, and going on


@pytest.mark.parametrize(
    ("where", "status", "says"),
    [
        ("POST /api/repos/create", 401, "The token is not valid there"),
        ("POST /api/repos/create", 403, f"may not write to {REPOSITORY}"),
        ("/preupload/", 404, f"There is no {REPOSITORY}"),
        ("/commit/", 409, "Someone else changed"),
        ("/objects/batch", 413, "smaller --split-size"),
        ("/commit/", 429, "asks to slow down"),
        ("PUT /lfs/", 500, "Error while uploading 'tiny-Q"),
        ("/preupload/", 503, "answered 503"),
        ("PUT /lfs/", DROP, "Error while uploading 'tiny-Q"),
        ("/commit/", DROP, f"{REPOSITORY} could not be published at http"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error_and_can_be_done_again(
    where: str, status: int, says: str, results: Path, server: Hub, run: Run
) -> None:
    said = f"the reason, with {TOKEN}"
    server.faults.append(Fault(where, status, times=99, message=said))
    code, _, err = run("publish", results, REPOSITORY)
    assert code == 1 and says in err and "Traceback" not in err, err
    assert not any(server.branches.get(REPOSITORY, {}).values())
    if status >= 500 or status in (DROP, 409, 429):
        assert "Run the command again" in err
    if status != DROP:
        assert f"answered {status}" in err and "the reason, with ***" in err
    server.faults.clear()
    assert run("publish", results, REPOSITORY)[0] == 0
    assert set(BIG) <= set(server.branches[REPOSITORY]["main"])


def test_what_arrived_is_not_sent_again(results: Path, server: Hub, run: Run) -> None:
    """The second of two files never arrives; run again, only that one is sent."""
    first, second = (sha256(results / name) for name in BIG)
    server.faults.append(Fault(f"/lfs/{second}", DROP, times=99))
    assert run("publish", results, REPOSITORY)[0] == 1
    assert set(server.stored) == {first} and server.branches[REPOSITORY]["main"] == {}
    server.faults.clear()
    seen = len(server.log)
    assert run("publish", results, REPOSITORY)[0] == 0
    again = [line for line in server.log[seen:] if "/lfs/" in line and "/objects/" not in line]
    assert again and all(second in line for line in again)


def test_a_connection_that_drops_once_is_not_noticed(results: Path, server: Hub, run: Run) -> None:
    server.faults += [Fault("PUT /lfs/", DROP), Fault("/preupload/", 503), Fault("/objects/batch", 429)]
    assert run("publish", results, REPOSITORY)[0] == 0
    assert [fault.times for fault in server.faults] == [0, 0, 0]
    assert server.branches[REPOSITORY]["main"][BIG[0]] == (results / BIG[0]).read_bytes()
