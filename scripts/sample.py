"""Draw images without condition, or of classes: the same as `ldm sample`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
