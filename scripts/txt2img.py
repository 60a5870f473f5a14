"""Draw images of a text: the same as `ldm txt2img`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.txt2img import main

if __name__ == "__main__":
    sys.exit(main())
