"""Lines break between words, tables fit 80 columns."""

from jax_speedrun.tools.layout import make_table, print_table, wrap


def test_lines_break_between_words_and_a_path_stays_whole():
    path = "/" + "deep/" * 30 + "file.json"
    lines = wrap(f"written: {path} and {'word ' * 30}", "  ").splitlines()
    assert path in [line.strip() for line in lines]
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert all(line.startswith("  ") for line in lines[1:])
    assert wrap("text-with-hyphens " * 6).splitlines()[0].endswith("hyphens")


def test_a_table_keeps_its_numbers_and_breaks_its_words(capsys):
    table = make_table("a title " * 20, "what", *("some number",) * 4)
    table.add_row("a long description of what was measured " * 2, *("123.45 ±12.3%",) * 4)
    print_table(table, "a note " * 20)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\n".join(lines).count("123.45 ±12.3%") == 4
    words = {word for line in lines for word in line.split()}
    assert {"description", "measured", "title", "note"} <= words
    assert "…" not in "".join(lines)
