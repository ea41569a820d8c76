"""Results on the Hugging Face hub: checked against their report, large GGUF files in parts, one commit.

huggingface_hub sends everything, finds the token where it always does, and skips what the hub has already; so a run
that was interrupted goes on where it stopped. Nothing is sent before all files are found to be what the report says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_parts import part_bytes
from qronos_export.card import CARD, LICENSE, MARK, model_card, public, write_card
from qronos_export.checkpoint import looks_like_id
from qronos_export.errors import PublishError, UsageError
from qronos_export.gate import Gates
from qronos_export.llamacpp import LlamaCpp, part_names
from qronos_export.report import Artifact, sha256
from qronos_export.results import REPORT, Results
from qronos_export.workspace import check_space, workspace

SPLIT_SIZE = "48G"  # the hub asks for files below 50 GB
_MAIN = "main"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Upload:
    """One file on its way: where it goes, what it is, and its sha256."""

    name: str
    content: Path | bytes
    size: int
    sha256: str | None = None


def megabytes(text: str) -> int:
    """`48G` or `500M`, as llama-gguf-split counts: millions of bytes. Raises UsageError."""
    found = re.fullmatch(r"([1-9]\d{0,5})([MG])", text)
    if found is None:
        raise UsageError(f"--split-size is {text!r}; expected a number and M or G, such as 48G.")
    return int(found[1]) * (1000 if found[2] == "G" else 1)


def check_proof(results: Results, gates: Gates) -> list[str]:
    """Why the results should not be published: one sentence for each file that was not measured or missed a limit."""
    reasons = []
    for artifact in results.artifacts:
        failures = ["it was not validated."]
        if found := results.validation(artifact):
            failures = [verdict.says for verdict in gates.verdicts(found) if not verdict.passed]
        reasons += [f"{artifact.path}: {failure}" for failure in failures]
    return reasons


def publish(
    results: Results,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    gates: Gates | None = None,
    force: bool = False,
    split_size: int = 48_000,
    llamacpp: Callable[[], LlamaCpp],
    dry_run: bool = False,
    say: Say = lambda line: None,
) -> tuple[list[Upload], str | None]:
    """Put `results` into the model repository `repository` (owner/name), made where it does not exist, as one commit
    on `revision` (None: its main branch). What was or would be sent, and the address of the commit.

    private: for a repository that is made now. split_size: in MB, above which a GGUF is published in parts. `llamacpp`
    is only asked for when one is. `force` publishes what `check_proof` refuses. `say` hears what is being done.

    Raises UsageError, PublishError, LlamaCppError, OutputError; the repository then is as it was before.
    """
    if not looks_like_id(repository) or "@" in repository:
        raise UsageError(f"{repository!r} is no repository of the hub; expected OWNER/NAME.")
    if (reasons := check_proof(results, gates or Gates())) and not force:
        raise PublishError(
            f"{results.folder} is not fit to be published: {' '.join(reasons)} "
            "Validate it, choose another recipe, or publish it nevertheless with --force."
        )
    token = get_token()
    if token is None and not dry_run:
        raise PublishError(
            f"No token of {constants.ENDPOINT} was found. Run `hf auth login` with one that may write, or set HF_TOKEN."
        )
    _check_card(results, repository)
    hashes: dict[Path, str] = {}
    for artifact in results.artifacts:
        say(f"checking {artifact.path}")
        hashes |= results.verify(artifact)
    large = [each for each in results.artifacts if _is_large(each, split_size)]
    tools = llamacpp() if large else None
    counts = {each.path: tools.parts(results.folder / each.path, split_size) for each in large} if tools else {}
    parts = {name: part_names(name, len(tensors)) for name, tensors in counts.items() if len(tensors) > 1}
    _check_card_parts(results, parts)
    if dry_run:
        planned = {name: _planned(results.folder / name, names, counts[name]) for name, names in parts.items()}
        return [*_files(results, hashes, planned), *_beside(results, repository, parts)], None
    if not (results.folder / CARD).exists():
        write_card(results, repository, parts)
    with workspace(results.folder, [], force=False) if parts else nullcontext(results.folder) as scratch:
        check_space(scratch, sum((results.folder / name).stat().st_size for name in parts))
        written = {}
        for name in parts:
            assert tools is not None
            say(f"splitting {name} into {len(parts[name])} parts")
            files = tools.split(results.folder / name, split_size, scratch)
            _check_parts(results.folder / name, files)
            written[name] = [Upload(part.name, part, part.stat().st_size, sha256(part)) for part in files]
        uploads = [*_files(results, hashes, written), *_beside(results, repository, parts)]
        say(f"uploading {len(uploads)} files, {sum(each.size for each in uploads) / 1e6:,.1f} MB, to {repository}")
        with _errors(repository, revision or _MAIN, token or ""):
            return uploads, _send(uploads, repository, private, revision, results.report["model"]["name"])


def _send(uploads: list[Upload], repository: str, private: bool, revision: str | None, name: str) -> str:
    """The address of the commit."""
    api = HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.repo_info(repository).private:
        raise PublishError(f"{repository} exists and is public; change that in its settings, or leave --private out.")
    if revision and revision != _MAIN and not revision.startswith("refs/"):
        api.create_branch(repository, branch=revision, exist_ok=True)
    operations = [_operation(each) for each in uploads]
    message = f"{name} by qronos-export"
    return str(api.create_commit(repository, operations, commit_message=message, revision=revision).commit_url)


def _is_large(artifact: Artifact, split_size: int) -> bool:
    return artifact.path.endswith(".gguf") and artifact.bytes > split_size * 10**6


_ANEW = "Delete it, to have it written anew, or correct it."


def _our_card(results: Results) -> str:
    """The text of a card of ours that lies there, else nothing; one that people wrote is theirs."""
    path = results.folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text if MARK in text else ""


def _check_card(results: Results, repository: str) -> None:
    """Raises PublishError for a card of ours that is of another run or for another repository."""
    text = _our_card(results)
    if text and (stale := [each.path for each in results.artifacts if each.sha256 not in text]):
        raise PublishError(
            f"{results.folder / CARD} does not name the sha256 of {stale[0]}, so it was written for other files. "
            + _ANEW
        )
    named = set(re.findall(r"(?:--hf-repo |hf download |hf\.co/)([\w.-]+/[\w.-]+)", text)) - {repository}
    if named:
        raise PublishError(
            f"{results.folder / CARD} says how to run the files of {min(named)}, not of {repository}. {_ANEW}"
        )


def _check_card_parts(results: Results, parts: dict[str, list[str]]) -> None:
    """Raises PublishError for a card of ours that names other files than are sent."""
    text = _our_card(results)
    sent = {name for names in parts.values() for name in names}
    named = set(re.findall(r"[^\s`/]+-\d{5}-of-\d{5}\.gguf", text))
    wrong = [*(named - sent), *(names[0] for names in parts.values() if names[0] not in named)] if text else []
    if wrong:
        raise PublishError(
            f"{results.folder / CARD} was written for another --split-size: {min(wrong)} is in it or sent, not both. "
            + _ANEW
        )


def _files(results: Results, hashes: dict[Path, str], parts: dict[str, list[Upload]]) -> Iterator[Upload]:
    for artifact in results.artifacts:
        if artifact.path in parts:
            yield from parts[artifact.path]
            continue
        for path in results.files(artifact):
            yield Upload(path.relative_to(results.folder).as_posix(), path, path.stat().st_size, hashes[path])


def _planned(file: Path, names: Sequence[str], counts: Sequence[int]) -> list[Upload]:
    """The parts of `file`, with `counts` tensors each, before they are written."""
    sizes = part_bytes(GGUFFile(file), counts)
    return [Upload(name, b"", size) for name, size in zip(names, sizes, strict=True)]


def _beside(results: Results, repository: str, parts: dict[str, list[str]]) -> Iterator[Upload]:
    """Card, license and report, as they lie there or would be written."""
    for name, text in (
        (CARD, lambda: model_card(results, repository, parts)),
        (LICENSE, lambda: results.report["model"].get("license_text", "")),
        (REPORT, lambda: json.dumps(public(results.report), indent=2, ensure_ascii=False) + "\n"),
    ):
        path = results.folder / name
        content = path.read_bytes() if name != REPORT and path.is_file() else text().encode()
        if content:
            yield Upload(name, content, len(content))


def _operation(upload: Upload) -> CommitOperationAdd:
    operation = CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=upload.content)
    if upload.sha256 is not None:  # the hub then refuses a file that changed since it was checked
        operation.upload_info.sha256 = bytes.fromhex(upload.sha256)
    return operation


def _check_parts(file: Path, parts: list[Path]) -> None:
    """Raises PublishError unless `parts` together hold the tensors of `file`, byte for byte."""
    whole = GGUFFile(file)
    found: dict[str, GGUFFile] = {}
    for part in parts:
        opened = GGUFFile(part)
        found |= dict.fromkeys(opened.tensors, opened)
    for name, tensor in whole.tensors.items():
        there = found.pop(name, None)
        if there is None or there.tensors[name].type != tensor.type or (there.bytes(name) != whole.bytes(name)).any():
            raise PublishError(f"{name} of {file} is not the same in its parts; check the disk and run this again.")
    if found:
        raise PublishError(f"The parts of {file} hold {next(iter(found))}, which it does not have.")


@contextmanager
def _errors(repository: str, revision: str, token: str) -> Iterator[None]:
    """What huggingface_hub and what it builds on raise, as a PublishError that says what to do."""
    from huggingface_hub.errors import HTTPError  # of httpx, whose name changed between versions

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        said = _explained(error, repository, revision)
        raise PublishError(said.replace(token, "***") if token else said) from None


def _explained(error: BaseException, repository: str, revision: str) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    file = next((str(each) for each in chain if str(each).startswith("Error while uploading")), "")
    refused = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    wrong = isinstance(error, ValueError)  # something of ours, such as metadata of the card
    again = "" if wrong else "Run the command again: what the hub has already is not sent again."
    if refused is None:
        said = " ".join(str(chain[-1] if file else error).split()) or type(chain[-1]).__name__
        what = f"{repository} could not be published at {constants.ENDPOINT}: {file} {said.rstrip('.')}. {again}"
        return " ".join(what.split())
    status = refused.response.status_code
    said = " ".join(str(refused.server_message or refused.response.reason_phrase).split())
    advice = {
        401: "The token is not valid there; run `hf auth login` with one that may write, or set HF_TOKEN.",
        403: f"The token may not write to {repository}; use one with that right, or a repository of your own.",
        404: f"There is no {repository} or no revision {revision} there, or the token may not see it.",
        409: f"Someone else changed {repository} meanwhile. {again}",
        413: "Something is larger than the hub takes; use a smaller --split-size.",
        429: f"The hub asks to slow down; wait some minutes. {again}",
    }.get(status, again)
    return " ".join(
        f"{constants.ENDPOINT} answered {status} for {repository}: {said.rstrip('.')}. {file} {advice}".split()
    )
