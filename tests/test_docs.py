"""What the documents show is what the project has: code as it stands, examples that run, links that lead somewhere."""

import doctest
import re
import textwrap

import pytest

from tests.paths import ROOT

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
COURSE = ROOT / "docs" / "block-sparse-attention.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Each block of Python, with the paragraph before it."""
    parts = re.split(r"^```(?:python)?\n", text, flags=re.MULTILINE)
    return [(before.strip().split("\n\n")[-1], code) for before, code in zip(parts[::2], parts[1::2], strict=False)]


def stands_in(code: str, source: str) -> bool:
    """Whether whole lines of `source` in a row are `code`, indented alike."""
    lines, wanted = source.splitlines(), code.splitlines()
    windows = (lines[i : i + len(wanted)] for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent("\n".join(window)) == "\n".join(wanted) for window in windows)


def test_code_on_the_page_is_the_code_that_trains() -> None:
    shown = [(before, code) for before, code in code_blocks(COURSE.read_text()) if ">>>" not in code]
    assert len(shown) >= 10
    for before, code in shown:
        (source,) = (ROOT / "docs" / link for link in LINK.findall(before) if link.endswith(".py"))
        assert stands_in(code, source.read_text()), f"{source.name} does not hold:\n{code}"


def test_examples_on_the_page_run() -> None:
    results = doctest.testfile(str(COURSE), module_relative=False, verbose=False)
    assert results.attempted >= 20
    assert results.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in LINK.findall(path.read_text()):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        goal = path.parent / target if target else path
        assert goal.exists(), f"{document} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_changed_line_would_be_seen() -> None:
    source = "def f():\n    if x:\n        a = 1\n        b = 2\n"
    assert stands_in("a = 1\nb = 2\n", source)
    assert not stands_in("a = 1\nb = 3\n", source)
    assert not stands_in("if x:\na = 1\n", source)
