import sys

from jax_speedrun.tools.comparison.reference_run import main

if __name__ == "__main__":
    sys.exit(main())
