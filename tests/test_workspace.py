"""What runs leave in their output: scratch that nobody holds is swept, results are replaced by those they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qronos_export.errors import OutputError
from qronos_export.resume import FOLDER, State, discard, resumable
from qronos_export.workspace import SCRATCH, scratch, workspace

WANTED = {"recipe": "one"}


def test_scratch_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{SCRATCH}left"
    (left / "graph").mkdir(parents=True)
    (left / "graph" / "weights").write_bytes(bytes(8))
    other = tmp_path / "other"
    other.mkdir()
    with scratch(tmp_path) as held, workspace(tmp_path, [], force=False) as mine:
        assert {held, mine, other} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == [other]


def test_a_file_system_without_locks_is_never_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with scratch(tmp_path) as held, workspace(tmp_path, [], force=False):
        assert held.is_dir()
    assert not any(tmp_path.iterdir())
    with pytest.raises(OutputError, match="cannot be locked"), begun(tmp_path):
        pass


@contextmanager
def begun(output: Path, force: bool = False) -> Iterator[State]:
    """A run with one result that is interrupted after it has drawn its tokens."""
    with resumable(output, [output / "report.json"], force, WANTED) as state:
        state.made("tokens", lambda folder: {})
        yield state
        raise KeyboardInterrupt


def deliver(state: State, text: str) -> None:
    made = state.folder / "report.json"
    made.write_text(text)
    state.deliver(made, state.root.parent / made.name)


def test_results_of_another_run_are_not_replaced(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt), begun(tmp_path):
        pass
    report.write_text("another's")
    with pytest.raises(OutputError, match=r"report\.json exists, and the run that .* continues did not write it"):
        begun(tmp_path).__enter__()
    assert report.read_text() == "another's" and (tmp_path / FOLDER / "tokens").is_dir()
    with pytest.raises(KeyboardInterrupt), begun(tmp_path, force=True) as state:
        deliver(state, "first")
    with pytest.raises(KeyboardInterrupt), begun(tmp_path) as state:
        deliver(state, "second")
    with pytest.raises(KeyboardInterrupt), begun(tmp_path):
        pass
    report.write_text("another's")
    with pytest.raises(OutputError, match="did not write it"):
        begun(tmp_path).__enter__()


def test_a_folder_is_known_by_all_its_files(tmp_path: Path) -> None:
    def run(force: bool = False) -> None:
        with resumable(tmp_path, [tmp_path / "onnx"], force, WANTED) as state:
            state.made("tokens", lambda folder: {})
            (state.folder / "onnx" / "deep").mkdir(parents=True)
            (state.folder / "onnx" / "deep" / "config").write_text("{}")
            state.deliver(state.folder / "onnx", tmp_path / "onnx")
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
    (tmp_path / "onnx" / "deep" / "config").write_text("{ }")
    with pytest.raises(OutputError, match="did not write it"):
        run()


def test_a_state_is_discarded_unless_a_run_holds_it(tmp_path: Path) -> None:
    discard(tmp_path)
    with pytest.raises(KeyboardInterrupt), begun(tmp_path):
        discard(tmp_path)
        assert (tmp_path / FOLDER).is_dir()
    discard(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_a_kill_leaves_of_a_state_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH}over").mkdir()
    (tmp_path / f"{SCRATCH}over" / "manifest.json").write_text("{}")
    with resumable(tmp_path, [], False, WANTED):
        pass
    assert not any(tmp_path.iterdir())
