"""The program `ldm`, also `python -m ldm`: one command for each task; a command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from itertools import takewhile
from types import ModuleType

from ldm.toy import TEXT_TO_IMAGE
from ldm.training.interrupt import quiet_at_ctrl_c

COMMANDS = {
    "train": "train an autoencoder or a latent diffusion model",
    "sample": "draw images: of a text, without condition, or of classes",
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
    "config": "list and show the shipped configs, or write the JSON schema of the YAML",
    "distill": "distil a model into one that draws in a few steps",
    "ema": "make averages of other lengths from the snapshots of a run",
    "export": "write the weights of a run as one file",
    "doctor": "look at data, first stage, config or plan before GPU time is spent",
    "serve": "show runs and draw samples on a local web page",
    "encode": "encode a training set into files",
    "completion": "complete commands, flags, configs and runs in a shell",
}
_OLDER = {"check-data": ["doctor", "data"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, which is the first word of the command line, and return its exit status."""
    name, words = spelled_out((sys.argv[1:] if argv is None else list(argv)) or ["--help"])
    if name in COMMANDS:
        with quiet_at_ctrl_c():
            command = module_of(name)
        return command.main(words)
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    sys.stderr.write(f"error: ldm {name}: unknown; use one of {', '.join(COMMANDS)}\n")
    return 1


def spelled_out(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that is run, and its words, for what is shorter than they are."""
    name, *words = [*_OLDER.get(words[0], words[:1]), *words[1:]]
    if name == "sample" and words and not words[0].startswith("-") and "=" not in words[0]:
        return "txt2img", [*_shipped_model(words), "--prompt", *words]
    return name, _of_training(words) if name == "train" else words


def module_of(name: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"ldm.cli.{name.replace('-', '_')}")


def _shipped_model(words: Sequence[str]) -> list[str]:
    """Return the words that choose the small model of scenes that is shipped, none where a model is given."""
    is_given = any(word.partition("=")[0] in ("-r", "--run", "--resume", "--config", "--ckpt") for word in words)
    return [] if is_given else ["--run", str(TEXT_TO_IMAGE), "--sampler", "euler", "--steps", "12", "--scale", "3"]


def _of_training(words: list[str]) -> list[str]:
    """Return the words of main.py for `ldm train CONFIG ... [KEY=VALUE] [flags]`, which trains without a -t."""
    configs = list(takewhile(lambda word: not word.startswith("-") and "=" not in word, words))
    is_told = {"-t", "--train", "--dry-run", "-h", "--help"} & set(words)
    return [*(["--base", *configs] if configs else []), *words[len(configs) :], *([] if is_told else ["-t"])]


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}\n" for name, text in COMMANDS.items()]
    return "usage: ldm COMMAND [arguments]; ldm COMMAND --help\n\n" + "".join(lines)
