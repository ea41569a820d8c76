"""A Hugging Face hub on 127.0.0.1: the endpoints that a snapshot download talks to, over files of this machine.

Real HTTP for the real client, which is told of it by HF_ENDPOINT; gated and absent repositories answer as the hub does.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

ABSENT = "v9"  # a revision no repository has
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve folders as model repositories of one commit; yields the endpoint's URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            repository = "/".join((path.removeprefix("api/models/")).split("/")[:2])
            if repository in gated:
                self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            elif repository not in repositories:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            elif f"/revision/{ABSENT}" in path:
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            elif path.startswith(f"api/models/{repository}/tree/"):
                self._json([_entry(file) for file in sorted(repositories[repository].iterdir())])
            elif path.startswith("api/models/"):
                files = sorted(file.name for file in repositories[repository].iterdir())
                self._json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
            else:
                self._file(repositories[repository] / Path(path).name)

        do_HEAD = do_GET

        def _json(self, body: object) -> None:
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _file(self, file: Path) -> None:
            if not file.is_file():
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
