"""What a file and a report say of the model they were made from, without llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_write import Fact, lineage, restate, write_gguf
from qronos_export.checkpoint import base_card
from qronos_export.provenance import dataset_of, file_facts, validation_facts
from qronos_export.recipe import Recipe

HUB = {"name": "tiny", "repository": "some-one/tiny-1B", "revision": "abc"}
HERE = {"name": "tiny", "repository": None, "revision": None}


def float_file(path: Path, **keys: int | str) -> GGUFFile:
    """A float file without tensors and with these keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.add_key_value(key.replace("__", "."), value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_facts_know_no_place(tmp_path: Path) -> None:
    """What a file says is the same wherever it was made, and on whatever it was computed; settings show."""
    file = float_file(tmp_path / "f.gguf")
    here = Recipe("/home/me/tiny", "Q4_0", calibration="/home/me/text.txt", device="cpu")
    there = replace(
        here, model="x/tiny", format="Q4_0,Q8_0", calibration="a.txt", device="cuda:1", artifact="gguf,onnx"
    )
    text = {"text": "text.txt", "sha256": "f" * 64, "tokens": 64}
    facts = file_facts(file, here.to_json(), "Q4_0", HERE, text)
    assert facts == file_facts(file, there.to_json(), "Q4_0", HERE, {**text, "text": "a.txt"})
    assert "home" not in json.dumps(facts) and facts["qronos_export.calibration.tokens"] == 64
    for change in ({"damping": 0.1}, {"calibration": "self"}, {"seed": 7}):
        assert facts != file_facts(file, replace(here, **change).to_json(), "Q4_0", HERE, text)
    assert facts != file_facts(file, here.to_json(), "Q8_0", HERE, text)


def test_a_model_of_the_hub_is_named_in_upstreams_keys(tmp_path: Path) -> None:
    """Parents that its own card states stay; of a model without any the file is the child."""
    url = "https://huggingface.co/some-one/tiny-1B"
    assert lineage(float_file(tmp_path / "f.gguf"), "some-one/tiny-1B") == {
        "general.source.repo_url": url,
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny 1B",
        "general.base_model.0.organization": "Some One",
        "general.base_model.0.repo_url": url,
    }
    stated = float_file(tmp_path / "g.gguf", general__base_model__count=2)
    assert lineage(stated, "some-one/tiny-1B") == {"general.source.repo_url": url}
    facts = file_facts(stated, Recipe("some-one/tiny-1B", method="rtn").to_json(), "Q4_0", HUB, None)
    assert facts["qronos_export.model"] == "some-one/tiny-1B@abc" and "qronos_export.calibration.sha256" not in facts


def test_facts_are_written_and_win(tmp_path: Path) -> None:
    source = float_file(tmp_path / "f.gguf", general__name="tiny", qronos_export__version="0.0")
    facts: dict[str, Fact] = {"qronos_export.version": "1", "qronos_export.calibration.tokens": 9}
    for name in ("a.gguf", "b.gguf"):
        write_gguf(source, BlockStore(tmp_path / "blocks"), 2, tmp_path / name, facts)
    written = GGUFFile(tmp_path / "a.gguf")
    assert {key: written.stated(key) for key in (*facts, "general.name")} == {**facts, "general.name": "tiny"}
    assert written.stated("absent") is None
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_file_is_told_how_it_was_measured(tmp_path: Path) -> None:
    """Metadata changes, tensors of every kind stay; telling it again changes the values alone."""
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_file_type(2)
    writer.add_string("qronos_export.version", "1")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = GGUFFile(tmp_path / "f.gguf")
    measured = dict.fromkeys(("kl_divergence", "kl_divergence_error", "perplexity", "perplexity_error"), 0.125)
    measured |= {"perplexity_reference": 9.5, "same_top": 90.0, "same_top_error": 0.5}
    facts = validation_facts(
        {**measured, "chunks": 4, "context": 64, "text_sha256": "ab", "llama_cpp": "b1", "kl_max": 9.0}
    )
    restate(before, facts, tmp_path / "g.gguf")
    after = GGUFFile(tmp_path / "g.gguf")
    assert {key: after.stated(key) for key in facts} == facts and after.stated(
        "qronos_export.validation.kl_max"
    ) is None
    assert after.stated("qronos_export.version") == "1" and after.stated("general.file_type") == 2
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in before.tensors.items():
        assert replace(after.tensors[name], offset=tensor.offset) == tensor
        assert np.array_equal(after.bytes(name), before.bytes(name))
    restate(after, {**facts, "qronos_export.validation.chunks": 5}, tmp_path / "h.gguf")
    again = GGUFFile(tmp_path / "h.gguf")
    assert again.stated("qronos_export.validation.chunks") == 5 and len(again.reader.fields) == len(after.reader.fields)
    assert (tmp_path / "h.gguf").stat().st_size == (tmp_path / "g.gguf").stat().st_size


@pytest.mark.parametrize(
    ("text", "metadata", "noted"),
    [
        ("---\nlicense: mit\nlanguage: en\nwidget: []\n---\n", {"license": "mit", "language": "en"}, False),
        ("---\nlicense: [a, b]\nlanguage: [en, 3]\npipeline_tag: {a: b}\n---\n", {"license": ["a", "b"]}, False),
        ("# No metadata\n", {}, False),
        ("---\nlicense: [mit\n---\n", {}, True),
        ("---\n- a list\n---\n", {}, True),
        (None, {}, False),
    ],
)
def test_a_card_is_taken_as_it_is_or_not_at_all(
    text: str | None, metadata: dict[str, object], noted: bool, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    found = base_card(tmp_path)
    assert (found.metadata, bool(found.note), found.license_text) == (metadata, noted, None)
    (tmp_path / "LICENSE.txt").write_text("Terms")
    assert base_card(tmp_path).license_text == "Terms"


@pytest.mark.parametrize(
    ("calibration", "dataset"),
    [("self", None), ("text.txt", None), ("hf:wikitext:wikitext-2-raw-v1:train", "wikitext"), ("hf:a/b", "a/b")],
)
def test_the_dataset_of_a_calibration(calibration: str, dataset: str | None, tmp_path: Path) -> None:
    assert dataset_of(calibration) == dataset
    assert dataset_of(f"hf:{tmp_path}") is None  # a folder
