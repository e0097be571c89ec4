"""Both methods on an embedded default: a seed model is fitted for a small verifiable world, where answers are checked.

python -m launch.quickstart
"""

import sys

from lm_jax.errors import UserError

OUTPUT = "runs/quickstart"

if __name__ == "__main__":
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.exit(print(__doc__))
    if sys.argv[1:]:
        sys.exit(f"error: unexpected argument {sys.argv[1]!r}; it takes none")

    from lab.quickstart import quickstart

    try:
        quickstart(OUTPUT)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on with the seed model and does the rest anew")
