"""Where the checkout is, and what modules it holds."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_names() -> set[str]:
    """Return the name under which each file of ours is imported."""
    files = [*(ROOT / "jax_speedrun").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return {name if name.split(".")[0] == "jax_speedrun" else f"jax_speedrun.{name}" for name in names}
