import sys

from jax_speedrun.tools.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
