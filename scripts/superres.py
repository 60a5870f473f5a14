"""Enlarge images: the same as `ldm superres`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["superres", *sys.argv[1:]]))
