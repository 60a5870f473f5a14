"""Train and measure a toy of every conditional task of the paper: the same as `ldm tasks`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.tasks import main

if __name__ == "__main__":
    sys.exit(main())
