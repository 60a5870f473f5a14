"""Train and measure a toy of every conditional task of the paper: the same as `ldm tasks`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["tasks", *sys.argv[1:]]))
