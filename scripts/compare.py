"""Compare the values of two evaluations: the same as `ldm compare`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
