"""Encode a training set into files: the same as `ldm encode`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.encode import main

if __name__ == "__main__":
    sys.exit(main())
