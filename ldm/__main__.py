"""`python -m ldm`: the program `ldm`, see `ldm.cli.program`."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
