"""Run an ablation study: the same as `ldm ablate`; --help says how."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
