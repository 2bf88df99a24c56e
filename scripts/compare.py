import sys

from jax_speedrun.tools.comparison.compare import main

if __name__ == "__main__":
    sys.exit(main())
