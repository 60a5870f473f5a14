"""Embed the images of a folder with CLIP: the same as `ldm build-retrieval`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["build-retrieval", *sys.argv[1:]]))
