import sys

from jax_speedrun.tools.draw_masks import main

if __name__ == "__main__":
    sys.exit(main())
