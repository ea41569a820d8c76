"""Pages say what is so: the command reference is the program's own, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_what_the_command_line_says() -> None:
    done = subprocess.run([sys.executable, "tools/reference", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead(page, page.read_text(encoding="utf-8")) == []


def test_this_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading: `x`\n")
    text = (
        "[a](page.md#a-heading-x) [b](page.md#b) [c](gone.md) ![d](d.svg) <img src='e.svg'> [f](https://example.org)\n"
    )
    assert dead(page, text + "```\n[g](g.md)\n```\n[h](#h)\n") == ["page.md#b", "gone.md", "d.svg", "e.svg", "#h"]


def dead(page: Path, text: str) -> list[str]:
    """Links from `page`, which says `text`, to files that are not there or headings that these do not have."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for link in re.findall(r"""\]\(([^)\s]+)\)|(?:src|srcset)=["']([^"']+)""", text):
        address = link[0] or link[1]
        if re.match(r"[a-z]+:", address):
            continue
        path, _, anchor = address.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target if path else page, "" if path else text)):
            wrong.append(address)
    return wrong


def anchors(page: Path, text: str) -> set[str]:
    """What GitHub calls the headings of a page, or of `text` where it is given."""
    text = text or page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
