"""Train an autoencoder or a latent diffusion model: python main.py --base CONFIG.yaml -t [flags] [key=value ...]."""

import sys

from ldm.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
