import sys

from jax_speedrun.tools.bench.attention import main

if __name__ == "__main__":
    sys.exit(main())
