"""Write the weights of a run as one safetensors file: the same as `ldm export`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
