import sys

from jax_speedrun.tools.train import main

if __name__ == "__main__":
    sys.exit(main())
