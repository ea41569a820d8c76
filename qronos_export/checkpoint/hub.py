"""Hugging Face hub ids: download what a float checkpoint consists of, nothing that can run."""

import re
from pathlib import Path

from qronos_export.errors import CheckpointError

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")  # owner/name@revision
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]


def looks_like_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None


def split(model: str) -> tuple[str, str | None]:
    """Repository and revision (branch, tag or commit; None is the default branch) of `owner/name[@revision]`."""
    found = HUB_ID.fullmatch(model)
    assert found is not None
    return found[1], found[2]


def download(repository: str, revision: str | None = None) -> tuple[Path, str]:
    """The snapshot's folder in the hub's own cache and its commit; a cached snapshot serves when the hub is away.

    Raises CheckpointError where the repository is unknown, gated, or neither reachable nor cached.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, "
            f"then run `hf auth login` with that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a model on {constants.ENDPOINT}. Check the spelling; "
            f"if it is private, run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision}; give a branch, a tag or a commit.") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is not in the cache and {constants.ENDPOINT} cannot be reached. "
            f"Connect, or give a folder that holds the checkpoint."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository} could not be downloaded from {constants.ENDPOINT}: {error}. "
            f"Run the command again: finished files are kept."
        ) from error
    return folder, folder.name
