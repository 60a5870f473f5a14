"""Draw images of a text: the same as `ldm txt2img`; --help says how."""

import sys

from ldm.cli.txt2img import main

if __name__ == "__main__":
    sys.exit(main())
