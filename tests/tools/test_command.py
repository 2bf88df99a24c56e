"""One convention for all commands, and thin scripts."""

import argparse
import ast
import importlib
import inspect

import pytest

from jax_speedrun.errors import UsageError
from jax_speedrun.tools.command import make_parser, run_command
from tests.paths import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def run(work, *arguments):
    parser = make_parser("walk.py", "Walk.\n\n  indented")
    parser.add_argument("--steps", type=int, default=1)
    return run_command(parser, work, list(arguments))


def test_the_works_code_is_the_commands():
    assert run(lambda options: options.steps, "--steps", "7") == 7


def fail(error):
    def work(_):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("--steps 0: must be 1 or more"), 2, "walk.py: error: --steps 0: must be 1 or more\n"),
        (KeyboardInterrupt(), 130, "walk.py: stopped\n"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(capsys, error, code, said):
    assert run(fail(error)) == code
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        run(fail(ValueError("ours")))


def test_help_keeps_its_lines(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(fail(AssertionError()), "--help")
    assert "Walk.\n\n  indented\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_calls_a_command_of_the_package_and_does_nothing_else(script):
    _, imported, guard = ast.parse(script.read_text()).body
    assert isinstance(imported, ast.ImportFrom)
    assert [alias.name for alias in imported.names] == ["main"]
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    sys.exit(main())"
    module = importlib.import_module(imported.module)
    parser = module.parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert parser.prog == script.name
    signature = inspect.signature(module.main)
    assert [p.default for p in signature.parameters.values()] == [None]
    assert signature.return_annotation is int
