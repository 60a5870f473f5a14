"""Fill holes in images: the same as `ldm inpaint`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["inpaint", *sys.argv[1:]]))
