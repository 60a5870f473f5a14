"""Draw images without condition, or of classes: the same as `ldm sample`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
