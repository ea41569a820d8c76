"""Hub ids, against a hub on this machine; the client runs in a process of its own, as HF_ENDPOINT is read once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import make
from tests.hub_server import ABSENT, COMMIT, hub

PROGRAM = """
import json, sys
from qronos_export.checkpoint import open_checkpoint
from qronos_export.errors import CheckpointError
try:
    found = open_checkpoint(sys.argv[1])
    print(json.dumps([found.name, found.revision, sorted(file.name for file in found.folder.iterdir())]))
except CheckpointError as error:
    print(json.dumps(str(error)))
"""


def ask(endpoint: str, repository: str, home: Path) -> list | str:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, repository], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def dead_endpoint() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_a_hub_id_is_downloaded_without_code_and_served_from_the_cache_when_the_hub_is_away(tmp_path: Path) -> None:
    folder = make("phi3", tmp_path / "tiny")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with hub({"someone/tiny": folder}) as endpoint:
        name, revision, files = ask(endpoint, "someone/tiny", tmp_path / "home")
        assert ask(endpoint, f"someone/tiny@{COMMIT}", tmp_path / "other") == [name, revision, files]
        missing = ask(endpoint, f"someone/tiny@{ABSENT}", tmp_path / "home")
        assert isinstance(missing, str) and f"someone/tiny has no revision {ABSENT}" in missing
    assert (name, revision) == ("tiny", COMMIT)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} <= set(files)
    assert not {"modeling.py", "pytorch_model.bin"} & set(files)
    assert ask(dead_endpoint(), "someone/tiny", tmp_path / "home") == [name, revision, files]


@pytest.mark.parametrize(
    ("repository", "says"),
    [("someone/absent", "neither a folder here nor a model"), ("someone/gated", "accept its terms")],
)
def test_a_refused_hub_id_says_what_to_do(repository: str, says: str, tmp_path: Path) -> None:
    with hub({}, gated=("someone/gated",)) as endpoint:
        answer = ask(endpoint, repository, tmp_path)
    assert isinstance(answer, str)
    assert repository in answer
    assert says in answer


def test_an_unreachable_hub_is_named(tmp_path: Path) -> None:
    endpoint = dead_endpoint()
    answer = ask(endpoint, "someone/tiny", tmp_path)
    assert isinstance(answer, str)
    assert "cannot be reached" in answer
    assert endpoint in answer
