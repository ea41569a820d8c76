"""Runs another program to its end: no shell, a time limit, no orphans, and what it printed in the error.

Owns nothing but the child process. What the lines mean is the caller's business.
"""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, ParamSpec, TypeVar

from qronos_export.errors import LlamaCppError

TAIL = 30  # lines of output an error repeats

P = ParamSpec("P")
T = TypeVar("T")


class SilentError(LlamaCppError):
    """A program failed by its exit code and printed nothing."""


def until_told(silence: type[LlamaCppError]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Run a use of llama.cpp again where that lost its last words (its issue 22142; on a busy machine it was seen to do
    so three times in a row); the last of six `silence`s is an error."""

    def decorate(use: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(use)
        def told(*args: P.args, **kwargs: P.kwargs) -> T:
            for _ in range(5):
                with contextlib.suppress(silence):
                    return use(*args, **kwargs)
            return use(*args, **kwargs)

        return told

    return decorate


def run(
    command: Sequence[str | Path],
    *,
    time_limit: float,
    on_line: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
    exit_codes: Container[int] = (0,),
    plain: Callable[[str], str] = str,
    hint: str = "",
) -> str:
    """What `command` printed, whole lines of both streams about in the order written. `on_line` sees each line as it
    comes and may raise to stop the program.

    `time_limit` is in seconds; `environment` is added to ours; `exit_codes` mean
    success; a failure's message shows each line as `plain` puts it and ends in `hint`. The program leads
    its own process group, which is killed when the limit passes or anything is raised here, Ctrl-C included.

    Raises LlamaCppError when the program cannot be started, fails or takes too long, SilentError when it failed without
    a word.
    """
    arguments = [str(part) for part in command]
    lines: list[str] = []

    def failure(what: str, kind: type[LlamaCppError] = LlamaCppError) -> LlamaCppError:
        tail = [f"    {plain(line)}" for line in lines[-TAIL:]] or ["    (it printed nothing)"]
        message = [
            f"{Path(arguments[0]).name} {what}.",
            f"  command: {shlex.join(arguments)}",
            "  it ended with:",
            *tail,
        ]
        return kind("\n".join([*message, hint] if hint else message))

    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            start_new_session=True,
        )
    except OSError as error:
        raise failure(f"could not be started ({error.strerror})") from error

    expired = threading.Event()

    def kill() -> None:
        if process.returncode is None:  # not reaped, so the group id cannot belong to anyone else yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(time_limit, expire)
    timer.daemon = True
    timer.start()
    printed: SimpleQueue[str | None] = SimpleQueue()
    # One pipe for both would let a line of one stream land inside a line of the other: programs flush by the block.
    readers = [Thread(target=_read, args=(stream, printed), daemon=True) for stream in (process.stdout, process.stderr)]
    for reader in readers:
        reader.start()
    try:
        open_streams = len(readers)
        while open_streams:
            if (line := printed.get()) is None:
                open_streams -= 1
                continue
            lines.append(line)
            if on_line:
                on_line(line)
        process.wait()
    except BaseException:
        kill()
        process.wait()
        raise
    finally:
        timer.cancel()

    if expired.is_set():
        raise failure(f"was stopped after {time_limit:g} seconds, its time limit")
    if process.returncode < 0:
        number = -process.returncode
        advice = ": it was built for another CPU" if number == signal.SIGILL else ""
        raise failure(f"was killed by signal {number} ({signal.strsignal(number)}){advice}")
    if process.returncode not in exit_codes:
        raise failure(f"failed with exit code {process.returncode}", LlamaCppError if lines else SilentError)
    return "\n".join(lines)


def _read(stream: IO[str], printed: SimpleQueue[str | None]) -> None:
    """Every line of `stream`, then None."""
    with stream:
        for line in stream:
            printed.put(line.rstrip("\n"))
    printed.put(None)
