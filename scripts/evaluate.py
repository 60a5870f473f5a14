"""Measure what a run has learned: the same as `ldm evaluate`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
