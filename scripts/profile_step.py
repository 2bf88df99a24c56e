import sys

from jax_speedrun.tools.profile_step import main

if __name__ == "__main__":
    sys.exit(main())
