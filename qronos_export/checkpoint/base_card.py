"""What a checkpoint's authors say of it: metadata of its model card, the text of its license. Nothing is guessed."""

from dataclasses import dataclass
from pathlib import Path

CARD = "README.md"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
TAKEN = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""The keys of a card that hold for a quantized model as well."""


@dataclass(frozen=True)
class BaseCard:
    """`metadata`: those of TAKEN that the card has. `license_text`: of a license file beside it, None without one.
    `note`: why a card that is there was not read; empty otherwise."""

    metadata: dict[str, str | list[str]]
    license_text: str | None
    note: str = ""


def base_card(folder: Path) -> BaseCard:
    """What lies in a checkpoint's `folder`; a damaged card costs its metadata, not the run."""
    from huggingface_hub import ModelCard

    found = next((folder / name for name in LICENSES if (folder / name).is_file()), None)
    text = None if found is None else found.read_text(encoding="utf-8", errors="replace")
    if not (folder / CARD).is_file():
        return BaseCard({}, text)
    try:
        card = ModelCard.load(folder / CARD)
    except Exception as error:  # whatever YAML or huggingface_hub raise on a stranger's text
        said = " ".join(str(error).split())
        return BaseCard(
            {}, text, f"{CARD} of the checkpoint cannot be read, so its license is not known here ({said})."
        )
    return BaseCard({key: value for key in TAKEN if _plain(value := card.data.get(key))}, text)


def _plain(value: object) -> bool:
    """A string or several; what else a card may hold is not taken over."""
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(each, str) and each for each in several)
