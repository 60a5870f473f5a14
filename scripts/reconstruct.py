"""Encode and decode images with a first stage: the same as `ldm reconstruct`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["reconstruct", *sys.argv[1:]]))
