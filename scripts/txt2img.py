"""Draw images of a text: the same as `ldm txt2img`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["txt2img", *sys.argv[1:]]))
