"""Check the data of a config: the same as `ldm check-data`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
