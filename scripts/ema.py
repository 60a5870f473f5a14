"""Write the weights of a run as one safetensors file: the same as `ldm ema`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.ema import main

if __name__ == "__main__":
    sys.exit(main())
