"""Train an autoencoder or a latent diffusion model: python main.py --base CONFIG.yaml -t [flags] [key=value ...]."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
