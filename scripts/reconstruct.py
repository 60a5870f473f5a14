"""Encode and decode images with a first stage: the same as `ldm reconstruct`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.reconstruct import main

if __name__ == "__main__":
    sys.exit(main())
