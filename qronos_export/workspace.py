"""Room on disk for a run: a scratch folder inside its output, and how much is needed there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qronos_export.checkpoint import Checkpoint
from qronos_export.errors import OutputError
from qronos_export.memory import ran_out
from qronos_export.recipe import Recipe

SCRATCH = ".qronos-export-run-"
"""What names of folders begin with that are of no use once the run that made them is over."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def workspace(output: Path, results: list[Path], force: bool) -> Iterator[Path]:
    """A scratch folder inside `output`, gone afterwards. Raises OutputError where results exist already."""
    sweep(output)
    check_free(results, force)
    with existing(output), scratch(output) as folder:
        yield folder


def check_free(results: list[Path], force: bool) -> None:
    """Raises OutputError where results exist already."""
    occupied = [path for path in results if path.exists()]
    if occupied and not force:
        raise OutputError(f"{occupied[0]} exists already; choose another --output, or --force to replace it.")


@contextmanager
def existing(output: Path) -> Iterator[None]:
    """`output` is a folder meanwhile; folders made for it are gone afterwards unless something is in them."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write to {output}: {error.strerror}.") from error
    try:
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def scratch(output: Path, again: str = "") -> Iterator[Path]:
    """A new folder inside `output`, gone afterwards. Raises OutputError where a file cannot be written meanwhile, or
    read; `again` is with what to run it again."""
    try:
        folder, handle = _held_folder(output)
    except OSError as error:
        raise OutputError(f"Cannot write to {output}: {error.strerror}.") from error
    try:
        yield folder
    except OSError as error:
        if ran_out(error):
            raise
        raise OutputError(_failure(error, output, again)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _held_folder(output: Path) -> tuple[Path, int | None]:
    """A new folder inside `output` and the handle that holds its lock; None where the file system has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=output))
        try:
            handle = lock(folder)
        except (BlockingIOError, FileNotFoundError):  # a run that sweeps was faster
            continue
        except OSError:
            return folder, None
        if folder.exists():
            return folder, handle
        os.close(handle)


def sweep(output: Path) -> None:
    """Remove scratch folders inside `output` of runs that were killed: nobody holds their locks."""
    for folder in output.glob(f"{SCRATCH}*"):
        try:
            handle = lock(folder)
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def lock(folder: Path) -> int:
    """A handle that holds the folder's lock until it is closed or the process ends, whatever ends it. Raises
    BlockingIOError where another process has it, OSError where there is none to be had."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _failure(error: OSError, output: Path, again: str) -> str:
    """What failed where a run works in `output`; "writing" only where the error says so."""
    why = error.strerror or str(error) or type(error).__name__
    if error.errno in _FULL:
        return f"Writing to {error.filename or output} failed: {why}. Make room there and run it again{again}."
    what = error.filename or f"a file of the run in {output}"
    return f"Reading or writing {what} failed: {why}. Mend that and run it again{again}."


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError unless `needed` bytes are free: first the float file, then blocks and files of all formats."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.3g} GB free; {needed / 1e9:.3g} GB are needed there on the way."
        )


def stored_bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))


def float_bytes(checkpoint: Checkpoint) -> int:
    """What the checkpoint takes in float32."""
    return stored_bytes(checkpoint) * 4 // checkpoint.dtype.itemsize


def folded_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """What `fold` writes at most at a time: one checkpoint in float32, and while one is made of it another."""
    return min(len(recipe.transform_names), 2) * float_bytes(checkpoint)
