import sys

from jax_speedrun.tools.sampling import main

if __name__ == "__main__":
    sys.exit(main())
