"""Check the data of a config: the same as `ldm check-data`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
