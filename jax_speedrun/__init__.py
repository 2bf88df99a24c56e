"""The NanoGPT speedrun recipe in JAX: data, model, optimiser, training loop.

The directory `kernels/` at the top of the repository is importable as
`jax_speedrun.kernels` (a symbolic link), never as a top-level package: that
name belongs to a distribution by Hugging Face which may be installed too.
"""

import sys

if sys.platform == "win32":
    raise SystemExit("jax_speedrun does not run on Windows; use WSL 2, Linux or macOS")
