"""A disk that is full: nothing short stays unnoticed, and what failed is said as it was."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from qronos_export import corpus, pipeline
from qronos_export.artifact.onnx_data import DataFile
from qronos_export.calibration import Clock
from qronos_export.durable import read_raw, write_raw
from qronos_export.errors import OutputError
from qronos_export.recipe import Recipe
from qronos_export.report import RunReport
from qronos_export.resume import Pieces
from qronos_export.workspace import scratch


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tokens_that_do_not_fit_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 numbers are fewer than a buffer of the C library holds, which loses them without a word."""
    tokens = torch.arange(100).view(10, 10)
    monkeypatch.setattr(corpus, "calibration_tokens", lambda *_, **__: corpus.Corpus(tokens, "numbers", "0"))

    def draw(folder: Path) -> torch.Tensor:
        recipe, device = Recipe("none", samples=10, sequence_length=10), torch.device("cpu")
        folder.mkdir()
        report = RunReport({}, {}, {}, "cpu")
        return pipeline._draw(recipe, None, device, report, Clock(), Pieces(folder), None)  # type: ignore[arg-type]

    with full_after(400), pytest.raises(OSError, match="File too large"):
        draw(tmp_path / "full")
    assert not (tmp_path / "full" / "tokens" / "tokens").exists()
    assert torch.equal(draw(tmp_path / "roomy"), tokens)


def test_onnx_data_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with full_after(1000), pytest.raises(OSError, match="File too large"), DataFile(tmp_path / "data") as data:
        data.put("numbers", np.ones(600, np.float32))


def test_numbers_that_end_early(tmp_path: Path) -> None:
    write_raw(tmp_path / "numbers", [torch.arange(4)])
    with (tmp_path / "numbers").open("rb") as file:
        assert read_raw(file, torch.empty(3, dtype=torch.int64)).tolist() == [0, 1, 2]
        with pytest.raises(OutputError, match=r"numbers is shorter than what was written there"):
            read_raw(file, torch.empty(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Writing to {} failed: No space left on device. Make room"),
        (OSError(errno.EDQUOT, "Quota exceeded", "/a/file"), "Writing to /a/file failed: Quota exceeded. Make room"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/text"), "Reading or writing /a/text failed: No such"),
        (OSError("600 requested and 0 written"), "a file of the run in {} failed: 600 requested and 0 written. Mend"),
        (OSError(), "a file of the run in {} failed: OSError. Mend that and run it again with --resume."),
    ],
)  # fmt: skip
def test_what_failed_is_said(error: OSError, says: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as failed, scratch(tmp_path, " with --resume"):
        raise error
    assert says.format(tmp_path) in str(failed.value)
    assert not any(tmp_path.iterdir())
