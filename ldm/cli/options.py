"""Arguments that the programs share, and the values that they become: no argparse.Namespace leaves a parser."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ldm.cli.arguments import TaskParser, parse_with_overrides
from ldm.config import shipped
from ldm.diffusion.grids import grid_names
from ldm.errors import UserError
from ldm.models.guidance import Guidance
from ldm.models.loading import ModelSource
from ldm.pairs import pairs_of
from ldm.sampling import make_sampler, sampler_names, sampler_options
from ldm.sampling.base import Sampler

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
AS_TRAINED = 0  # --tile without a number
OptionalSize = tuple[int | None, int | None]  # (height, width)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Defaults:
    """Defaults of a task, those of its published script; n_samples: images of each input."""

    outdir: str
    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    n_samples: int = 1


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, to which device; tile: side in pixels, AS_TRAINED, or None for whole images."""

    source: ModelSource
    device: torch.device
    tile: int | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn, and the folder that they are written to.

    size: (height, width), None as trained or as given; batch_size None: as many as stand in a row of the grid; graphs:
    whether calls of the network are recorded and replayed on CUDA.
    """

    model: ModelOptions
    sampler: Sampler
    guidance: Guidance
    precision: str
    seed: int
    batch_size: int | None
    size: OptionalSize
    outdir: str
    has_grid: bool
    graphs: bool = True
    overrides: Sequence[str] = ()


class SamplingParser(TaskParser):
    """Parser of a program that samples: what all of them share, with the defaults of the task."""

    def __init__(self, name: str, description: str, defaults: Defaults) -> None:
        super().__init__(name, description)
        self.defaults = defaults
        add, count = self.add_argument, defaults.n_samples
        add("-n", "--n_samples", type=int, default=count, help=f"images of each input (default {count})")
        outdir = f"where images go (default {defaults.outdir})"
        add("-l", "--outdir", "--logdir", default=defaults.outdir, help=outdir)
        add_model_arguments(self)
        add_sampler_arguments(self, defaults)
        images = add_image_arguments(self)
        add_seed_arguments(images, seed=42)
        add_device_arguments(self)

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, SamplingOptions]:
        """Return the arguments of the task alone, with overrides of the config, and what all tasks share."""
        given = parse_with_overrides(self, argv)
        sampler = choose_sampler(given.sampler, given.ddim_steps, given.grid, given.ddim_eta, self.defaults)
        source = model_source(given)
        model = ModelOptions(source, choose_device(given.device), given.tile)
        guidance = Guidance.parse(given.scale, given.guidance, source.guide(given.guide), given.negative)
        how = (guidance, given.precision, given.seed, given.batch_size, (given.H, given.W))
        return given, SamplingOptions(model, sampler, *how, given.outdir, not given.skip_grid, not given.no_graphs,
                                     given.overrides)  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which weights: a run folder, or a config with a checkpoint."""
    group = parser.add_argument_group("model: --run, or --config with --ckpt")
    group.add_argument("-r", "--run", "--resume", metavar="RUN", help="run folder, or a checkpoint in one")
    group.add_argument("--config", type=shipped.find, metavar="YAML", help="config, ours or published")
    group.add_argument("--ckpt", metavar="FILE", help="checkpoint, ours or published; default: last.ckpt of --run")
    add = group.add_argument
    add("--ema", dest="weights", default="ema", metavar="NAME", help="use another average (training.params.averages)")
    add("--raw", dest="weights", action="store_const", const="raw", help="use the trained weights, no average")
    lora = "LoRA or DoRA that is added to the weights, or a share of it; may be given several times"
    add("--adapter", action="append", default=[], metavar="FILE[:0.8]", help=lora)


def model_source(given: argparse.Namespace) -> ModelSource:
    """Return the model that --run, --config, --ckpt, --ema, --raw and --adapter ask for."""
    return ModelSource(given.run, given.config, given.ckpt, given.weights, tuple(given.adapter))


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where and how precisely to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, or a device as torch names it")
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="32", help="of the network (default 32)")


def add_sampler_arguments(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add how to sample."""
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--no-graphs", action="store_true", help="launch kernels one by one; on CUDA, graphs launch them together")
    names = f"{', '.join(sampler_names())}; with options as heun:s_churn=40; ddpm takes all training steps"
    add("--sampler", default="ddim", metavar="NAME", help=names)
    short = {"dest": "sampler", "action": "store_const", "default": argparse.SUPPRESS}
    add("--plms", const="plms", help="the same as --sampler plms", **short)
    add("-v", "--vanilla_sample", const="ddpm", help="the same as --sampler ddpm", **short)
    names = ("-c", "--ddim_steps", "--steps", "--custom_steps")
    add(*names, type=int, metavar="S", help=f"steps (default {defaults.steps})")
    eta = f"noise of ddim, 0 is none (default {defaults.eta:g})"
    add("-e", "--ddim_eta", "--eta", type=float, metavar="ETA", help=eta)
    grid = "grid of times; compvis as published samples had (default: that of sampler and process)"
    add("--grid", "--spacing", choices=grid_names(), help=grid)
    guidance = f"classifier-free guidance, 1 is none (default {defaults.guidance:g})"
    add("--scale", type=float, default=defaults.guidance, help=guidance)
    more = "how else: interval=0.2:0.8, rescale=0.7, apg_eta=0, apg_norm=15, apg_momentum=-0.5"
    add("--guidance", nargs="+", default=[], metavar="NAME=VALUE", help=more)
    add("--negative", metavar="TEXT", help="what not to draw: guided away from, in place of the empty text")
    add("--guide", metavar="RUN", help="weaker run, earlier checkpoint, or ema:NAME, to guide away from (autoguidance)")


def choose_sampler(spec: str, steps: int | None, grid: str | None, eta: float | None, defaults: Defaults) -> Sampler:
    """Return the sampler that the arguments describe. UserError for an eta that it cannot use."""
    if eta is not None and not 0 <= eta < math.inf:
        raise UserError(f"--eta {eta:g}: use 0 (no noise) or more")
    name, _, rest = spec.partition(":")
    if name == "ddpm" and steps is not None:  # as published, whose flags may stand side by side
        _log.warning(
            "--steps %d: ddpm takes all training steps; for so many give --sampler ddpm:steps=%d", steps, steps
        )
    how = {} if name == "ddpm" else {"steps": defaults.steps if steps is None else steps, "grid": grid}
    flags = how if eta is None else {**how, "eta": eta}
    if again := [key for key in pairs_of(rest.split(","), f"--sampler {name}") if key in flags]:
        raise UserError(f"--sampler {spec}: {again[0]} has a flag of its own; give it by that alone")
    has_eta = "eta" in sampler_options(name)
    if eta and not has_eta and name != "ddpm":
        raise UserError(f"--eta {eta:g}: {name} has no eta; leave it out, or use --sampler ddim")
    eta = defaults.eta if eta is None and name == "ddim" else eta
    return make_sampler(spec, **how, **({"eta": eta} if has_eta else {}))


def add_seed_arguments(group: argparse._ArgumentGroup, seed: int) -> None:
    """Add from which seed, by default `seed`, and how many samples at a time."""
    add = group.add_argument
    counted = f"seed of the first sample; the next ones count on (default {seed})"
    add("-s", "--seed", type=int, default=seed, help=counted)
    add("--batch-size", "--batch_size", type=int, help="samples at a time; changes speed and memory, not the samples")


def add_image_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add how large images are and how they are shown. Return the group of these arguments."""
    group = add_side_arguments(parser)
    add = group.add_argument
    add("--skip_grid", action="store_true", help="write no grid of the images")
    tile = "work on overlapping squares of so many pixels (default: as trained), for images larger than trained"
    add("--tile", type=int, nargs="?", const=AS_TRAINED, metavar="PIXELS", help=tile)
    return group


def add_side_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add how large images are. Return the group of these arguments."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--H", type=int, help="height in pixels (default: as trained, or as given)")
    add("--W", type=int, help="width in pixels (default: as trained, or as given)")
    return group


def choose_device(name: str) -> torch.device:
    """Return a device by its name; `auto` is the accelerator if there is one. UserError if it cannot be used."""
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which a device that holds no values refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {name}: not usable on this machine ({reason}); use auto or cpu") from error
    return device


def progress(total: int, what: str) -> tqdm:
    """Show count, rate and time left on stderr: often on a terminal, seldom in a log file."""
    return tqdm(total=total, desc=what, unit="step", mininterval=0.2 if sys.stderr.isatty() else 30.0)
