"""The command line of main.py: flags as users of the original know them, and `dotted.key=value` overrides."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import allow
from ldm.config.overrides import split_overrides
from ldm.config.targets import did_you_mean
from ldm.errors import UserError

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")

_OWN = "let configs name classes of a package or module of your own; also LDM_ALLOW=PACKAGE,PACKAGE"
ALLOW = {"type": allow, "action": "append", "default": [], "metavar": "PACKAGE", "help": _OWN}
_RESUME = "go on with a run folder, a checkpoint in one, or (auto) the run of this name that was started last, if any"
_SEED = "seed of everything that is random (default: 23, or that of the run that goes on)"


@dataclass(frozen=True)
class Arguments:
    """The parsed command line; None or empty means not given."""

    base: list[str]
    allow: list[str]
    overrides: list[str]
    train: bool
    no_test: bool
    resume: str
    name: str
    postfix: str
    logdir: str
    seed: int | None
    debug: bool
    scale_lr: bool | None
    dry_run: bool
    gpus: str | None
    devices: str | None
    accelerator: str | None
    num_nodes: int | None
    strategy: str | None
    precision: str | None
    max_steps: int | None


def boolean(text: str) -> bool:
    """Return the truth value of yes/true/t/y/1 or no/false/f/n/0, in any case."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither of {', '.join(_TRUE)} nor of {', '.join(_FALSE)}")


def parse(argv: Sequence[str]) -> Arguments:
    """Parse the command line; overrides may be anywhere, also directly after a flag whose value is optional.

    Raises UserError for what is unknown.
    """
    parser = _parser()
    overrides, words = split_overrides(argv)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        hint = did_you_mean(word, flags) or "; see --help, and write overrides as dotted.key=value"
        raise UserError(f"command line: {word}: unknown{hint}")
    return Arguments(overrides=overrides, **vars(options))


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line in which `dotted.key=value` may stand anywhere; these become `options.overrides`."""
    overrides, words = split_overrides(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    options.overrides = overrides
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py" if Path(sys.argv[0]).name == "main.py" else "ldm train",
        allow_abbrev=False,
        description="Train an autoencoder or a latent diffusion model from YAML configs.",
        epilog="Any further dotted.key=value overrides the configs, e.g. data.params.batch_size=4.",
    )
    parser.add_argument("--allow", **ALLOW)
    flag = {"type": boolean, "nargs": "?", "const": True}
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="config files, merged left to right")
    add("-t", "--train", default=False, **flag, help="train; without it nothing is trained")
    add("--no-test", default=False, **flag, help="skip the data set `test` after training")
    add("-r", "--resume", default="", metavar="RUN", help=_RESUME)
    add("-n", "--name", default="", help="name of the run, behind the time")
    add("-f", "--postfix", default="", help="end of the name of the run")
    add("-l", "--logdir", default="logs", help="where run folders are made")
    add("-s", "--seed", type=int, default=None, help=_SEED)
    add("-d", "--debug", default=False, **flag, help="start the debugger where an exception was raised")
    add("--scale_lr", default=None, **flag, help="multiply base_learning_rate by the global batch size (default true)")
    add("--dry-run", default=False, **flag, help="print what would be trained, and stop")
    add("--gpus", default=None, help="GPUs: `1` how many; `0,` or `0,1` which; `auto` all; `0` none")
    add("--devices", default=None, help="devices of the accelerator, written as for --gpus")
    add("--accelerator", default=None, help="cpu, gpu, mps, auto ...")
    add("--num_nodes", type=int, default=None, help="number of machines")
    add("--strategy", default=None, help="how several devices work together, e.g. ddp")
    add("--precision", default=None, help="32, bf16-mixed, 16-mixed ...")
    add("--max_steps", type=int, default=None, help="number of optimiser steps")
    return parser
