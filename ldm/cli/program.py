"""The program `ldm`, also `python -m ldm`: one command for each task; a command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ldm.training.interrupt import quiet_at_ctrl_c

COMMANDS = {
    "train": "train an autoencoder or a latent diffusion model",
    "sample": "draw images without condition, or of classes",
    "txt2img": "draw images of a text",
    "img2img": "draw images that start from given ones",
    "inpaint": "fill holes in images",
    "superres": "enlarge images",
    "semantic2img": "draw images of semantic maps",
    "layout2img": "draw images of layouts",
    "knn2img": "draw images from the nearest neighbours of a text or an image",
    "reconstruct": "encode and decode images with a first stage",
    "build-retrieval": "embed the images of a folder for knn2img",
    "evaluate": "measure samples, reconstructions or a folder of images",
    "compare": "compare two evaluations",
    "ablate": "run an ablation study",
    "tasks": "train and measure a toy of every conditional task of the paper",
    "export": "write the weights of a run as one file",
    "check-data": "check the data of a config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, which is the first word of the command line, and return its exit status."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in COMMANDS:
        with quiet_at_ctrl_c():
            command = importlib.import_module(f"ldm.cli.{name.replace('-', '_')}")
        return command.main(words)
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    sys.stderr.write(f"error: ldm {name}: unknown; use one of {', '.join(COMMANDS)}\n")
    return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}\n" for name, text in COMMANDS.items()]
    return "usage: ldm COMMAND [arguments]; ldm COMMAND --help\n\n" + "".join(lines)
