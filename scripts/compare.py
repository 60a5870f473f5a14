"""Compare the values of two evaluations: the same as `ldm compare`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
