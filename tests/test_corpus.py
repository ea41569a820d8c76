"""Calibration text: what a window is, that seeds repeat, and what is refused."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch

from qronos_export import corpus as corpus_module
from qronos_export.checkpoint import Checkpoint, load_whole, open_checkpoint, tokenizer
from qronos_export.corpus import PIECE, _drawn, _pieces, calibration_tokens, held_out_text, median_length
from qronos_export.errors import CalibrationError
from qronos_export.recipe import Recipe
from qronos_export.resolved import matched
from tests.families import make


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokenizer puts a BOS (id 1) first."""
    return open_checkpoint(str(make("phi3", tmp_path_factory.mktemp("models") / "bos")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokenizer puts nothing first."""
    return open_checkpoint(str(make("qwen3", tmp_path_factory.mktemp("models") / "plain")))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(held_out_text(), encoding="utf-8")
    return file


def test_windows_are_disjoint_places_of_the_text_in_order(plain: Checkpoint, tmp_path: Path) -> None:
    text = held_out_text()[:PIECE]
    (tmp_path / "part.txt").write_text(text, encoding="utf-8")
    corpus = calibration_tokens(str(tmp_path / "part.txt"), plain, samples=20, length=64, seed=3)
    assert corpus.tokens.shape == (20, 64)
    assert corpus.tokens.dtype == torch.int64
    whole = torch.tensor(tokenizer(plain)(text, verbose=False)["input_ids"]).unfold(0, 64, 64)
    places = [int((whole == window).all(1).nonzero()[0]) for window in corpus.tokens]
    assert places == sorted(set(places))


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(plain: Checkpoint, book: Path) -> None:
    first, again, other = (calibration_tokens(str(book), plain, samples=8, length=32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256


def test_every_window_opens_with_the_tokenizers_bos(bos: Checkpoint, book: Path) -> None:
    tokens = calibration_tokens(str(book), bos, samples=4, length=32, seed=0).tokens
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:, 1:] != 1).all()


def test_tokenizing_in_pieces_is_tokenizing_whole_but_for_newlines_at_cuts(plain: Checkpoint) -> None:
    text = held_out_text()
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(len(piece) >= PIECE for piece in pieces[:-1])
    encode = tokenizer(plain)
    whole = encode(text, verbose=False)["input_ids"]
    joined = [i for piece in encode(pieces, verbose=False)["input_ids"] for i in piece]
    assert encode.decode(joined) == text
    assert abs(len(joined) - len(whole)) < len(pieces)


def test_a_short_text_says_how_much_it_has_and_what_would_fit(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two three four five six seven eight nine ten\n" * 10)
    with pytest.raises(CalibrationError, match=r"short.txt has 110 tokens; 8 samples of 32 need 256.*--samples 3\."):
        calibration_tokens(str(tmp_path / "short.txt"), plain, samples=8, length=32, seed=0)


def test_unreadable_text(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"GGUF\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"not UTF-8 text \(byte 4 is 0xff\)"):
        calibration_tokens(str(tmp_path / "binary"), plain, samples=1, length=8, seed=0)
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibration_tokens(str(tmp_path / "absent.txt"), plain, samples=1, length=8, seed=0)


def test_the_model_writes_its_own_calibration_text(bos: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH", 8)
    seen: list[tuple[int, int]] = []
    first, again, other = (
        calibration_tokens("self", bos, samples=20, length=16, seed=seed, on_progress=lambda *step: seen.append(step))
        for seed in (0, 0, 1)
    )
    assert first.tokens.shape == (20, 16)
    assert (first.tokens[:, 0] == 1).all()
    assert len(first.tokens.unique(dim=0)) == 20
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert seen[: len(seen) // 3][-1] == (320, 320)


def test_without_a_bos_windows_open_with_various_ordinary_tokens(plain: Checkpoint) -> None:
    opening = calibration_tokens("self", plain, samples=16, length=2, seed=0).tokens[:, 0].tolist()
    assert len(set(opening)) > 10
    assert not set(opening) & set(tokenizer(plain).all_special_ids)


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets  # an extra that tools/test installs: missing, it fails

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_the_model_that_wrote_the_text_is_gone_with_it(plain: Checkpoint) -> None:
    """Not when the garbage collector comes."""
    gc.collect()
    gc.disable()
    try:
        model = load_whole(plain)
        weight = ref(model.get_input_embeddings().weight), ref(model.get_decoder().layers[0].mlp.down_proj.weight)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.int64))
        del model
        assert [each() for each in weight] == [None, None]
    finally:
        gc.enable()


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([2.0, 1.0, -torch.inf, 0.0, 3.0, -60.0])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        left = _drawn(torch.empty(0), logits.expand(40_000, -1))
    assert bool(((left == 0).sum(1) == 1).all()) and bool(((left == 0) | left.isneginf()).all())
    share = torch.bincount(left.argmax(1), minlength=len(logits)) / len(left)
    torch.testing.assert_close(share, logits.softmax(0), rtol=0, atol=0.01)  # four standard errors
    assert share[2] == share[5] == 0


def test_a_dataset_of_texts_or_of_messages(plain: Checkpoint, tmp_path: Path) -> None:
    for column, rows in {
        "text": ["A line of text that says nothing in particular.\n"] * 40,
        "messages": [[{"role": "user", "content": "What is nothing?"}]] * 40,
    }.items():
        folder = tmp_path / column
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
        corpus = calibration_tokens(f"hf:{folder}", plain, samples=4, length=32, seed=0)
        text = tokenizer(plain).decode(corpus.tokens[0])
        assert ("<|im_start|>user\nWhat is nothing?<|im_end|>" in text) == (column == "messages")


@pytest.mark.usefixtures("offline_datasets")
def test_datasets_that_cannot_be_used(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(CalibrationError, match="has the columns number; needed"):
        calibration_tokens(f"hf:{tmp_path}", plain, samples=1, length=8, seed=0)
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        calibration_tokens(f"hf:{tmp_path}::absent", plain, samples=1, length=8, seed=0)
    with pytest.raises(CalibrationError, match="is not hf:NAME"):
        calibration_tokens("hf:", plain, samples=1, length=8, seed=0)


def test_prompts_are_lines_or_records_and_their_lower_median_counts(bos: Checkpoint, tmp_path: Path) -> None:
    prompts = [
        "What is nothing?",
        "Why?\u2028Because of all that there is and was.",
        "Yes or no?",
        "One more of them, and then another one.",
    ]
    lengths = sorted(len(tokenizer(bos)(prompt)["input_ids"]) for prompt in prompts)
    assert len(set(lengths)) == 4
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n\n".join(prompts) + "\n \n", encoding="utf-8")
    assert median_length(str(lines), bos) == lengths[1]
    records = tmp_path / "prompts.jsonl"
    both = [{"id": 7, "messages": [{"system": prompts[0]}, prompts[1]], "answer": None}, {"text": prompts[0]}]
    records.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in both), encoding="utf-8")
    assert median_length(str(records), bos) == len(tokenizer(bos)(prompts[0])["input_ids"])
    records.write_text(json.dumps(both[0]))
    assert median_length(str(records), bos) == len(tokenizer(bos)(f"{prompts[0]}\n{prompts[1]}")["input_ids"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "\n \n", "empty.txt holds no prompt; put one in each line"),
        ("numbers.jsonl", '{"id": 1}\n[]\n', "numbers.jsonl holds no prompt"),
        (
            "cut.jsonl",
            '{"text": "whole"}\n\n{"text": \n',
            r"cut\.jsonl, line 3 is not JSON \(.*one record in each line",
        ),
        ("short.txt", "a\n", "median of 1 tokens; put one in each line, of at least two tokens"),
        ("binary.txt", b"\xff", "not UTF-8 text"),
        ("absent.txt", None, r"cannot be read \(.*give a text file or a \.jsonl file of prompts"),
    ],
)
def test_prompts_that_say_no_length(
    name: str, content: str | bytes | None, says: str, plain: Checkpoint, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError, match=says):
        median_length(str(tmp_path / name), plain)


def test_matched_lengths_keep_the_number_of_tokens(bos: Checkpoint, tmp_path: Path) -> None:
    """At least as many, less than one sequence more; what comes out names no file any more and stays."""
    file = tmp_path / "prompts.txt"
    for words in (2, 7, 50):
        file.write_text("word " * words + "\n")
        length = median_length(str(file), bos)
        recipe = Recipe("bos", samples=6, sequence_length=64, match_lengths=str(file))
        found = matched(recipe, bos)
        assert found == replace(recipe, samples=found.samples, sequence_length=length, match_lengths=None)
        assert 0 <= found.samples * length - 6 * 64 < length
        assert matched(found, bos) == found
