"""Run an ablation study: the same as `ldm ablate`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
