"""A Hugging Face hub on 127.0.0.1 that takes uploads: the endpoints that create a repository, ask how files are to be
sent, take large ones by git-lfs's protocol (whole or in parts), and commit. Real HTTP for the real client.

It believes nothing: requests need the token, large files need the sha256 they were announced with, a commit needs files
that are there, a model card valid metadata. `faults` make it refuse, or drop the connection, as often as they say.
"""

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_only_for_this_test"
PART = 1 << 18  # bytes; larger files are sent in parts of it
DROP = 0  # a fault that is no status
LICENSES = {"apache-2.0", "mit", "llama3.2", "other"}
Files = dict[str, bytes]


@dataclass
class Fault:
    """The next `times` requests whose "METHOD path" contains `where` are answered by `status`, or not at all."""

    where: str
    status: int
    times: int = 1
    message: str = ""


@dataclass
class Hub:
    """What the hub holds and has seen. branches: repository -> branch -> files."""

    endpoint: str = ""
    branches: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # "PUT /lfs/…", whole and answered
    leaked: list[str] = field(default_factory=list)  # requests that carried the token where it has no business
    faults: list[Fault] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def sent(self, what: str) -> list[str]:
        return [line for line in self.log if what in line]


@contextmanager
def upload_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        self._route()

    do_POST = do_PUT = do_HEAD = do_GET

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        what = f"{self.command} {path}"
        with self.state.lock:
            fault = next((each for each in self.state.faults if each.times and each.where in what), None)
            if fault:
                fault.times -= 1
        if fault and fault.status == DROP:
            self.rfile.read(1000)  # in the middle of what is sent
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault:
            self._answer(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message})
            return
        given = self.headers.get("Authorization")
        if path.startswith("/lfs/"):
            if given:
                self.state.leaked.append(what)
        elif given != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
            return
        with self.state.lock:
            status, answer, headers = self._handle(path.strip("/").split("/"), body)
            if status < 400:
                self.state.log.append(what)
        self._answer(status, answer, headers)

    def _handle(self, path: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub = self.state
        match self.command, path:
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                answer = {"url": f"{hub.endpoint}/{name}", "name": name}
                if name in hub.branches:
                    return 409, answer, {}
                hub.branches[name] = {"main": {}}
                hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
                return 200, answer, {}
            case "POST", ["api", "validate-yaml"]:
                errors = _metadata_errors(json.loads(body)["content"])
                return (400 if errors else 200), {"errors": errors, "warnings": []}, {}
            case "GET", ["api", "models", owner, name] | ["api", "models", owner, name, "revision", _]:
                repository = f"{owner}/{name}"
                if repository not in hub.branches:
                    return 404, {}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                return 200, {"id": repository, "sha": "0" * 40, "private": hub.private[repository], "siblings": []}, {}
            case "POST", ["api", "models", owner, name, "branch", branch]:
                branches = hub.branches[f"{owner}/{name}"]
                if branch in branches:
                    return 409, {}, {}
                branches[branch] = dict(branches["main"])
                return 200, {}, {}
            case "POST", ["api", "models", owner, name, "preupload", branch]:
                there = hub.branches[f"{owner}/{name}"][branch]
                return 200, {"files": [_how(each, there) for each in json.loads(body)["files"]]}, {}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"objects": [self._lfs(each) for each in json.loads(body)["objects"]]}, {}
            case "PUT", ["lfs", oid]:
                return self._keep(oid, body)
            case "PUT", ["lfs", oid, number]:
                hub.parts[oid, int(number)] = body
                return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}
            case "POST", ["lfs", oid, "complete"]:
                asked = json.loads(body)["parts"]
                parts = [hub.parts[oid, each["partNumber"]] for each in asked]
                if any(hashlib.md5(part).hexdigest() != each["etag"] for part, each in zip(parts, asked, strict=True)):
                    return 400, {"error": "another part arrived"}, {}
                return self._keep(oid, b"".join(parts))
            case "POST", ["api", "models", owner, name, "commit", branch]:
                return self._commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"there is no {self.command} {'/'.join(path)} here"}, {}

    def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.state.stored:
            return known
        url = f"{self.state.endpoint}/lfs/{asked['oid']}"
        if asked["size"] <= PART:
            return {**known, "actions": {"upload": {"href": url}}}
        count = -(-asked["size"] // PART)
        header = {"chunk_size": str(PART), **{f"{number:05}": f"{url}/{number}" for number in range(1, count + 1)}}
        return {**known, "actions": {"upload": {"href": f"{url}/complete", "header": header}}}

    def _keep(self, oid: str, content: bytes) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "sha256 mismatch"}, {"X-Error-Message": "sha256 mismatch"}
        self.state.stored[oid] = content
        return 200, {}, {}

    def _commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
        files: Files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if len(self.state.stored.get(value["oid"], b"")) != value["size"]:
                    return 400, {"error": "lfs object missing"}, {"X-Error-Message": "lfs object missing"}
                files[value["path"]] = self.state.stored[value["oid"]]
        self.state.branches[repository][branch] |= files
        return 200, {"success": True, "commitUrl": f"{self.state.endpoint}/{repository}/commit/1", "commitOid": "1"}, {}

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: Any, headers: dict[str, str]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json"} | headers | {"Content-Length": str(len(text))}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _how(asked: dict[str, Any], there: Files) -> dict[str, Any]:
    """Binary files by git-lfs, as a repository's .gitattributes say."""
    large = asked["path"].endswith((".gguf", ".onnx", "data"))
    content = there.get(asked["path"])
    git = b"" if content is None else b"blob %d\0" % len(content) + content
    oid = None if content is None else hashlib.sha256(content).hexdigest() if large else hashlib.sha1(git).hexdigest()
    mode = "lfs" if large else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _metadata_errors(card: str) -> list[dict[str, str]]:
    """What the hub's own check would say of a card, as far as we write such keys."""
    _, block, _ = card.split("---\n", 2)
    data = yaml.safe_load(block)
    wrong = []
    if "license" in data and data["license"] not in LICENSES:
        wrong.append(f"license must be one of {sorted(LICENSES)}")
    if data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
        wrong.append("license other needs license_name and license_link")
    if "base_model" in data and data["base_model"].count("/") != 1:
        wrong.append("base_model is no model's id")
    if ("base_model_relation" in data) != ("base_model" in data):
        wrong.append("base_model_relation goes with base_model")
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(each, str) for each in data.get(key, [])):
            wrong.append(f"{key} must be a list of strings")
    return [{"message": each} for each in wrong]
