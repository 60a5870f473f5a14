"""Distil a model into one of few steps: the same as `ldm distill`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.distill import main

if __name__ == "__main__":
    sys.exit(main())
