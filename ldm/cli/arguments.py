"""The command line of main.py: flags as users of the original know them, and `dotted.key=value` overrides."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ldm.config import allow, shipped
from ldm.config.overrides import split_overrides
from ldm.config.targets import did_you_mean
from ldm.errors import UserError, shown
from ldm.training.cards import Card

LOGS = "logs"
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")

_OWN = (
    "let configs name classes of a package, write into path:FOLDER, read env:NAME of the environment, run the commands "
    "of pipe: shards; may be given several times; also LDM_ALLOW=NAME,NAME"
)
ALLOW = {"type": allow, "action": "append", "default": [], "metavar": "NAME", "help": _OWN}
BASE = {"type": shipped.find, "metavar": "YAML", "help": "config files or shipped names, merged left to right"}
CARD = {"type": Card.of, "metavar": "CARD"}
_RESUME = "go on with a run folder, a checkpoint in one, or (auto) the run of this name that was started last, if any"
_SEED = "seed of everything that is random (default: 23, or that of the run that goes on)"
_only_asked_for: ContextVar[bool] = ContextVar("only_asked_for", default=False)


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
    card: Card | None
    gpus: str | None
    devices: str | None
    accelerator: str | None
    num_nodes: int | None
    strategy: str | None
    precision: str | None
    max_steps: int | None


class ParserFound(BaseException):
    """A command has made its parser, and nothing but that was asked for, see `parser_of`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


class TaskParser(argparse.ArgumentParser):
    """Parser of a program, named `ldm NAME` in its help; its module's docstring is the description.

    leading: the flag whose values may stand before all flags without it, where the program `ldm` lets them.
    """

    leading = ""

    def __init__(self, name: str, description: str, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"ldm {name}", description=description, formatter_class=form, **options)
        self.add_argument("--allow", **ALLOW)

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = next((word for word in message.split() if word.startswith("-")), "")
        hint = did_you_mean(unknown, flags) if "unrecognized" in message else ""
        self.exit(2, f"error: {shown(' '.join(message.split()), 220)}{hint}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as all other ways to parse do through this one."""
        if _only_asked_for.get():
            raise ParserFound(self)
        return super().parse_known_args(args, namespace)


def parser_of(main: Callable[[Sequence[str]], Any]) -> argparse.ArgumentParser:
    """Return the parser that the `main` of a command makes; nothing is parsed or run."""
    token = _only_asked_for.set(True)
    try:
        main([])
    except ParserFound as found:
        return found.parser
    finally:
        _only_asked_for.reset(token)
    raise TypeError(f"{main.__module__}.main has no TaskParser")


def boolean(text: str) -> bool:
    """Return the truth value of yes/true/t/y/1 or no/false/f/n/0, in any case."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither of {', '.join(_TRUE)} nor of {', '.join(_FALSE)}")


_FLAG = {"type": boolean, "nargs": "?", "const": True}


def parse(argv: Sequence[str]) -> Arguments:
    """Parse the command line; overrides may be anywhere, also directly after a flag whose value is optional.

    Raises UserError for what is unknown.
    """
    parser = _parser()
    overrides, words = split_overrides(argv, _with_a_value(parser))
    options, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        hint = did_you_mean(word, flags) or "; see --help, and write overrides as dotted.key=value"
        raise UserError(f"command line: {word}: unknown{hint}")
    return Arguments(overrides=overrides, **vars(options))


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line in which `dotted.key=value` may stand anywhere; these become `options.overrides`."""
    overrides, words = split_overrides(sys.argv[1:] if argv is None else argv, _with_a_value(parser))
    options = parser.parse_args(words)
    options.overrides = overrides
    return options


def _with_a_value(parser: argparse.ArgumentParser) -> list[str]:
    """List the flags that the next word belongs to, whatever it is."""
    actions = [action for action in parser._actions if action.nargs in (None, "+")]
    return [flag for action in actions for flag in action.option_strings]


def _parser() -> argparse.ArgumentParser:
    more = {"epilog": "Any further dotted.key=value overrides the configs, e.g. data.params.batch_size=4."}
    parser = TaskParser(
        "train", "Train an autoencoder or a latent diffusion model from YAML configs.", allow_abbrev=False, **more
    )
    parser.leading = "--base"
    parser.prog = "main.py" if Path(sys.argv[0]).name == "main.py" else parser.prog
    add_plan_arguments(parser)
    add = parser.add_argument
    add("-t", "--train", default=False, **_FLAG, help="train; without it nothing is trained")
    add("--no-test", default=False, **_FLAG, help="skip the data set `test` after training")
    add("-d", "--debug", default=False, **_FLAG, help="start the debugger where an exception was raised")
    add("--dry-run", default=False, **_FLAG, help="print what would be trained, and stop")
    add("--card", default=None, **CARD, help="with --dry-run: what a step costs on a card of so many GiB, or H100 ...")
    return parser


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which training, on which devices."""
    add = parser.add_argument
    add("-b", "--base", **BASE, nargs="*", default=[])
    add("-r", "--resume", default="", metavar="RUN", help=_RESUME)
    add("-n", "--name", default="", help="name of the run, behind the time")
    add("-f", "--postfix", default="", help="end of the name of the run")
    add("-l", "--logdir", default=LOGS, metavar="DIR", help="where run folders are made")
    add("-s", "--seed", type=int, default=None, help=_SEED)
    add("--scale_lr", default=None, **_FLAG, help="multiply base_learning_rate by the global batch size (default true)")
    add("--gpus", default=None, help="GPUs: `1` how many; `0,` or `0,1` which; `auto` all; `0` none")
    add("--devices", default=None, help="devices of the accelerator, written as for --gpus")
    add("--accelerator", default=None, help="cpu, gpu, mps, auto ...")
    add("--num_nodes", type=int, default=None, help="number of machines")
    add("--strategy", default=None, help="how several devices work together, e.g. ddp")
    add("--precision", default=None, help="32, bf16-mixed, 16-mixed ...")
    add("--max_steps", type=int, default=None, help="number of optimiser steps")
