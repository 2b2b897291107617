"""The documents: every link leads somewhere, and the README stays short and plain."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / ".github" / "CONTRIBUTING.md", *sorted((REPOSITORY / "infra" / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
MOST_LINES, MOST_WORDS, MEAN_WORDS = 170, 35, 18  # of the README; words of a sentence


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    dead = []
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path = page if not target else (page.parent / target).resolve()
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(f"{target}#{anchor}")
    assert not dead


def test_the_readme_is_read_in_five_minutes():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    prose = re.sub(r"^(#|\||!).*$", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    prose = re.sub(r"^\[Your data\].*?\n\n", "", LINK.sub("]", prose), flags=re.DOTALL | re.MULTILINE)  # the list of pages
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?:])\s+", prose) if sentence.strip()]
    assert len(sentences) > 40
    assert max(map(len, sentences)) <= MOST_WORDS and sum(map(len, sentences)) / len(sentences) <= MEAN_WORDS
