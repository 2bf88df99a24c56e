"""Print which room imports which: for each package its modules and packages, a floor each, nothing leading upward.

    python -m jax_speedrun.tools.import_graph

A room stands one floor above the highest room that it imports. Imports inside functions count as well.
The rules that hold between rooms are in pyproject.toml, under [tool.importlinter].
"""

import argparse
import graphlib
import sys
from typing import TYPE_CHECKING

from ..errors import UsageError
from .command import make_parser, run_command

if TYPE_CHECKING:
    from grimp import ImportGraph

ROOT = "jax_speedrun"
Imports = dict[str, set[str]]


def parser() -> argparse.ArgumentParser:
    p = make_parser("import_graph", __doc__)
    p.add_argument("packages", nargs="*", metavar="PACKAGE", help="such as jax_speedrun.kernels (default: all)")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), _print, arguments)


def import_graph() -> "ImportGraph":
    """Return every import of the package, as grimp reads them from the source.

    Raises:
      UsageError: grimp is not installed.
    """
    try:
        import grimp
    except ImportError as error:
        raise UsageError("needs grimp, which comes with the test tools: pip install -e '.[test]'") from error
    return grimp.build_graph(ROOT, cache_dir=None)


def modules(graph: "ImportGraph") -> Imports:
    """Return what each module imports, of our own modules."""
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def rooms(graph: "ImportGraph", package: str) -> Imports:
    """Return what each room directly inside `package` imports of the others; a package is one room, with all in it."""
    found = graph.find_children(package)

    def room_of(module: str) -> str | None:
        return next((room for room in found if module == room or module.startswith(f"{room}.")), None)

    imports: Imports = {room: set() for room in found}
    for module, imported in modules(graph).items():
        if (room := room_of(module)) is not None:
            imports[room] |= {other for name in imported if (other := room_of(name)) not in (None, room)}
    return imports


def floors(imports: Imports) -> list[list[str]]:
    """Return rooms from the ground up, each on the floor above the highest of those it imports.

    Raises:
      graphlib.CycleError: for a circle, which it names.
    """
    height: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(imports).static_order():
        height[room] = max((height[below] + 1 for below in imports[room]), default=0)
    return [sorted(room for room in height if height[room] == floor) for floor in range(max(height.values()) + 1)]


def _print(options: argparse.Namespace) -> int:
    graph = import_graph()
    packages = options.packages or sorted(name for name in graph.modules if graph.find_children(name))
    for package in packages:
        if package not in graph.modules or not graph.find_children(package):
            raise UsageError(f"{package}: no package here; name one such as {ROOT}.kernels")
        imports = rooms(graph, package)
        try:
            levels = floors(imports)
        except graphlib.CycleError as error:
            print(f"\n{package}: a circle, {' <- '.join(error.args[1])}")
            return 1
        print(f"\n{package}: {len(imports)} rooms on {len(levels)} floors, no circle")
        for floor, names in reversed(list(enumerate(levels))):
            for name in names:
                below = ", ".join(sorted(_short(room, package) for room in imports[name])) or "nothing here"
                print(f"  {floor}  {_short(name, package):<24} {below}")
    return 0


def _short(room: str, package: str) -> str:
    return room.removeprefix(f"{package}.")


if __name__ == "__main__":
    sys.exit(main())
