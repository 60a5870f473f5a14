"""Embed the images of a folder with CLIP: the same as `ldm build-retrieval`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.build_retrieval import main

if __name__ == "__main__":
    sys.exit(main())
