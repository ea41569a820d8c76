"""What a run left in its folder, read back: the report, and whether the files are still those it speaks of."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qronos_export.errors import PublishError, ReportError
from qronos_export.report import SCHEMA, Artifact, sha256
from qronos_export.typed_json import typed
from qronos_export.validation import Validation

REPORT = "report.json"


@dataclass(frozen=True)
class Results:
    """A folder that `quantize` filled. `report` is report.json, `artifacts` its files and ONNX folders."""

    folder: Path
    report: dict[str, Any]
    artifacts: list[Artifact]

    def files(self, artifact: Artifact) -> list[Path]:
        """The artifact's files, sorted; of a folder all that are not hidden."""
        place = self.folder / artifact.path
        if place.is_file():
            return [place]
        return sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))

    def verify(self, artifact: Artifact) -> dict[Path, str]:
        """The sha256 of each file, after comparing with the report. Raises PublishError for what is missing or was
        changed since: a GGUF by its hash, an ONNX folder by the hash of its data and the bytes of all."""
        files = self.files(artifact)
        if not files:
            raise PublishError(f"{self.folder / artifact.path} is missing, though {REPORT} lists it. Quantize again.")
        hashes = {path: sha256(path) for path in files}
        size = sum(path.stat().st_size for path in files)
        if artifact.sha256 not in hashes.values() or size != artifact.bytes:
            raise PublishError(
                f"{self.folder / artifact.path} is not what {REPORT} was written for: {size} bytes for "
                f"{artifact.bytes}, or another sha256 than {artifact.sha256}. Quantize again."
            )
        return hashes

    def validation(self, artifact: Artifact) -> Validation | None:
        """What was measured of it. Raises PublishError for what is damaged or no finite number, or a report that
        another version wrote."""
        if not artifact.validation:
            return None
        try:
            return typed(Validation, artifact.validation, f"{self.folder / REPORT}: {artifact.path}: validation")
        except ReportError as error:
            raise PublishError(f"{error} Quantize again.") from error


def open_results(folder: Path) -> Results:
    """Raises PublishError where `folder` holds no report of a run, or one that names files outside of it."""
    file = folder / REPORT
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PublishError(
            f"{file} cannot be read ({error.strerror}); give the folder that `quantize` wrote."
        ) from error
    except ValueError as error:
        raise PublishError(f"{file} is no JSON ({error}); give the folder that `quantize` wrote.") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise PublishError(f"{file} is no report of schema {SCHEMA}, which this version writes. Quantize again.")
    known = {field.name for field in fields(Artifact)}
    try:
        artifacts = [
            Artifact(**{key: value for key, value in each.items() if key in known}) for each in report["artifacts"]
        ]
        for artifact in artifacts:
            if Path(artifact.path).name != artifact.path:
                raise PublishError(f"{file} lists {artifact.path!r}, which is no name of something in {folder}.")
        complete = bool(report["model"]["name"] and report["recipe"] and report["versions"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PublishError(f"{file} is damaged ({error!r}). Quantize again.") from error
    if not artifacts or not complete:
        raise PublishError(f"{file} lists no files; the run was not finished. Quantize again.")
    return Results(folder, report, artifacts)
