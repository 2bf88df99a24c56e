import sys

from jax_speedrun.tools.bench.matmuls import main

if __name__ == "__main__":
    sys.exit(main())
