import sys

from jax_speedrun.tools.rehearse_faults import main

if __name__ == "__main__":
    sys.exit(main())
