"""Draw images of layouts: the same as `ldm layout2img`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["layout2img", *sys.argv[1:]]))
