"""Write the weights of a run as one safetensors file, frozen parts included, with the config inside its metadata.

    python scripts/export.py --run logs/RUN --out model.safetensors [--ema] [--half]

The file is read by --ckpt of the other scripts; its names are those of the published checkpoints.
"""

from ldm.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
