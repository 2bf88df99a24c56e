"""What the benches share."""

from jax_speedrun.tools.bench.common import Table
from jax_speedrun.tools.bench.timing import milliseconds


def test_a_table_lines_up_and_leaves_gaps(capsys):
    table = Table({"name": "<6", "ms": "7.2f", "error": "8.1e"})
    table.add("abc", 1.5, None)
    table.add("abcdef", 12.345, 0.01)
    assert capsys.readouterr().out == "name        ms    error\nabc       1.50\nabcdef   12.35  1.0e-02\n"


def test_functions_take_turns_and_none_is_favoured():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "ab"}
    times = milliseconds(runs, calls=3, rounds=2, wait=lambda _: called.append("wait"))
    assert times.keys() == {"a", "b"}
    a, b = ([name, "wait", *(3 * name), "wait"] for name in "ab")
    assert called == ["a", "wait", "b", "wait", *a, *b, *a, *b]
