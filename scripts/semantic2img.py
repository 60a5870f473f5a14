"""Draw images of semantic maps: the same as `ldm semantic2img`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["semantic2img", *sys.argv[1:]]))
