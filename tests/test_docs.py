"""What the documents show is what the project has: code as it stands, examples that run, links that lead somewhere."""

import doctest
import json
import re
import shlex
import sys
import textwrap

import pytest

from tests.paths import ROOT
from tests.scripts import load_script

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
RUNS = ROOT / "docs" / "runs"
COURSE = ROOT / "docs" / "block-sparse-attention.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:docs|jax_speedrun|kernels|scripts|tests)/[\w./-]+\.\w+)")
COMMAND = re.compile(r"(?:^|`)python scripts/(\w+)\.py([^`#\n]*)", re.MULTILINE)


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    for name in FILE.findall((ROOT / document).read_text()):
        assert (ROOT / name).is_file(), f"{document} names {name}"


def test_commands_that_are_shown_have_those_options() -> None:
    shown = {command for document in DOCUMENTS for command in COMMAND.findall((ROOT / document).read_text())}
    assert len(shown) >= 10
    for script, arguments in sorted(shown):
        main = load_script(script).main
        sys.modules[main.__module__].parser().parse_args(shlex.split(arguments))


def test_the_index_of_runs_says_what_their_files_say() -> None:
    rows = [line for line in (RUNS / "README.md").read_text().splitlines() if line.startswith("| [")]
    cells = {LINK.findall(row)[0].split("/")[0]: [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert len(rows) == len(cells)
    assert set(cells) == {path.name for path in RUNS.iterdir() if path.is_dir()}
    for name, (date, card, versions, _, seed, val_loss, time, _) in cells.items():
        assert name.startswith(date)
        log = (RUNS / name / "log.txt").read_text()
        end = re.search(r"^step:(\d+)/\1 val_loss:(\S+) train_time:(\d+)ms", log, re.MULTILINE)
        assert (val_loss, time) == ((end[2], f"{int(end[3]) / 1000:.1f} s") if end else ("-", "-")), name
        config = json.loads((RUNS / name / "config.json").read_text())
        assert seed == str(config["config"]["seed"])
        assert card.removeprefix(f"{config['devices']['count']} ") in config["devices"]["kind"]
        library, version = versions.split()
        assert config["versions"][library].startswith(version)


def test_logs_of_runs_are_kept_without_every_step() -> None:
    for log in RUNS.glob("*/log.txt"):
        steps = [
            (int(match[1]), int(match[2]))
            for line in log.read_text().splitlines()
            if (match := re.match(r"step:(\d+)/(\d+) train_time", line))
        ]
        assert [step for step, _ in steps[:10]] == list(range(1, 11)), log
        assert all(step <= 10 or step % 25 == 0 or last - step < 10 for step, last in steps), log


def test_a_changed_line_would_be_seen() -> None:
    source = "def f():\n    if x:\n        a = 1\n        b = 2\n"
    assert stands_in("a = 1\nb = 2\n", source)
    assert not stands_in("a = 1\nb = 3\n", source)
    assert not stands_in("if x:\na = 1\n", source)
