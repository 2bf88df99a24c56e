import sys

from jax_speedrun.tools.bench.head import main

if __name__ == "__main__":
    sys.exit(main())
