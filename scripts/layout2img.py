"""Draw images of layouts: the same as `ldm layout2img`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.layout2img import main

if __name__ == "__main__":
    sys.exit(main())
