"""Draw images from the nearest neighbours of a text or an image: the same as `ldm knn2img`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["knn2img", *sys.argv[1:]]))
