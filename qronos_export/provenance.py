"""Where a file comes from, as facts that hold on every machine: what a GGUF says of itself, and a report of its model.

Only what decides the bytes goes into a file: no time, no path, no device. The same recipe therefore gives the same
bytes, until a validated file is told how it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qronos_export import __version__
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_write import Fact, lineage
from qronos_export.checkpoint import Checkpoint, base_card

_OF_THIS_MACHINE = ("model", "artifact", "accuracy_level", "device", "offload", "match_lengths")
"""Settings that a GGUF file does not depend on, or that are said elsewhere."""
_STATED = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


def model_facts(checkpoint: Checkpoint, source: GGUFFile) -> tuple[dict[str, Any], list[str]]:
    """The report's `model`, and notes. A checkpoint's card wins; without one its float GGUF `source` may say more.

    license, license_name, license_link, language, pipeline_tag: as the model's authors have them, else absent.
    license_text: of the license file that came with the checkpoint.
    """
    card = base_card(checkpoint.folder)
    stated = {key: source.stated(name) for key, name in _STATED.items()}
    facts = {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "repository": checkpoint.repository,
        "revision": checkpoint.revision,
        **(card.metadata or {key: value for key, value in stated.items() if value}),
    }
    if card.license_text is not None:
        facts["license_text"] = card.license_text
    return facts, [card.note] if card.note else []


def dataset_of(calibration: str) -> str | None:
    """The dataset of the hub that a recipe's `calibration` names; None for files, folders and `self`."""
    name = calibration.removeprefix("hf:").split(":")[0]
    return name if calibration.startswith("hf:") and not Path(name).expanduser().exists() else None


def file_facts(
    source: GGUFFile,
    recipe: Mapping[str, Any],
    format: str,
    model: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> dict[str, Fact]:
    """Keys that a GGUF file gets besides those of its float file `source`.

    general.source.repo_url, general.base_model.*: the hub's model it was made from, as upstream's converter names it;
    parents that the model's own card states stay. Who quantized (general.quantized_by) is for people to say.
    qronos_export.version, .recipe (JSON, sorted), .model (owner/name@commit), .calibration.sha256, .calibration.tokens.
    """
    facts: dict[str, Fact] = {
        "qronos_export.version": __version__,
        "qronos_export.recipe": json.dumps(_portable(recipe, format), sort_keys=True, ensure_ascii=False),
    }
    if calibration is not None:
        facts["qronos_export.calibration.sha256"] = calibration["sha256"]
        facts["qronos_export.calibration.tokens"] = calibration["tokens"]
    if model["repository"] is None:
        return facts
    facts["qronos_export.model"] = f"{model['repository']}@{model['revision']}"
    return facts | lineage(source, model["repository"])


_MEASURED = (
    "kl_divergence", "kl_divergence_error", "perplexity", "perplexity_error", "perplexity_reference", "same_top",
    "same_top_error", "chunks", "context", "text_sha256", "llama_cpp",
)  # fmt: skip


def validation_facts(validation: Mapping[str, Any]) -> dict[str, Fact]:
    """Keys qronos_export.validation.* for what a report says of a file's validation, in its units."""
    return {f"qronos_export.validation.{key}": validation[key] for key in _MEASURED}


def _portable(recipe: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The recipe of one of its formats, without what belongs to a machine; text of a file is said by its hash alone."""
    kept = {key: value for key, value in recipe.items() if key not in _OF_THIS_MACHINE}
    told = recipe["calibration"] == "self" or dataset_of(recipe["calibration"])
    return {**kept, "format": format, "calibration": recipe["calibration"] if told else "file"}
