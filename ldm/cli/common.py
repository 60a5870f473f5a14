"""What the scripts share: argument groups, device and precision, progress, and how mistakes are reported."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from ldm.cli.entry import main_guard as main_guard
from ldm.diffusion.grids import grid_names
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.models.loading import ModelSource
from ldm.sampling import make_sampler, sampler_names
from ldm.sampling.base import Sampler

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
AS_TRAINED = 0  # --tile without a number


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which weights: a run folder, or a config with a checkpoint."""
    group = parser.add_argument_group("model: --run, or --config with --ckpt")
    group.add_argument("-r", "--run", "--resume", metavar="RUN", help="run folder, or a checkpoint in one")
    group.add_argument("--config", metavar="YAML", help="config, ours or published")
    group.add_argument("--ckpt", metavar="FILE", help="checkpoint, ours or published; default: last.ckpt of --run")
    group.add_argument("--raw", action="store_true", help="use the trained weights instead of their moving average")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Say where and how precisely to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, or a device as torch names it")
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="32", help="of the network (default 32)")


def add_sampler_arguments(parser: argparse.ArgumentParser, steps: int, eta: float, scale: float) -> None:
    """Say how to sample, with the defaults of the published script of each task."""
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--sampler", choices=sampler_names(), default="ddim", help="ddpm takes all training steps")
    short = {"dest": "sampler", "action": "store_const", "default": argparse.SUPPRESS}
    add("--plms", const="plms", help="the same as --sampler plms", **short)
    add("-v", "--vanilla_sample", const="ddpm", help="the same as --sampler ddpm", **short)
    names = ("-c", "--ddim_steps", "--steps", "--custom_steps")
    add(*names, type=int, default=steps, metavar="S", help=f"steps (default {steps})")
    add("-e", "--ddim_eta", "--eta", type=float, metavar="ETA", help=f"noise of ddim, 0 is none (default {eta:g})")
    grid = "grid of times; compvis as published samples had (default: that of sampler and process)"
    add("--grid", "--spacing", choices=grid_names(), help=grid)
    add("--scale", type=float, default=scale, help=f"classifier-free guidance, 1 is none (default {scale:g})")
    parser.set_defaults(default_eta=eta)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which samples, from which seed, and how many at a time."""
    add_seed_arguments(add_picture_arguments(parser), seed=42)


def add_seed_arguments(group: argparse._ArgumentGroup, seed: int) -> None:
    """Say from which seed, by default `seed`, and how many samples at a time."""
    add = group.add_argument
    counted = f"seed of the first sample; the next ones count on (default {seed})"
    add("-s", "--seed", type=int, default=seed, help=counted)
    add("--batch-size", "--batch_size", type=int, help="samples at a time; changes speed and memory, not the samples")


def add_picture_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Say how large pictures are and how they are shown. Returns the group of these arguments."""
    group = add_side_arguments(parser)
    add = group.add_argument
    add("--skip_grid", action="store_true", help="write no grid of the pictures")
    tile = "work on overlapping squares of so many pixels (default: as trained), for pictures larger than trained"
    add("--tile", type=int, nargs="?", const=AS_TRAINED, metavar="PIXELS", help=tile)
    return group


def add_side_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Say how large pictures are. Returns the group of these arguments."""
    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--H", type=int, help="height in pixels (default: as trained, or as given)")
    add("--W", type=int, help="width in pixels (default: as trained, or as given)")
    return group


def add_task_arguments(
    parser: argparse.ArgumentParser, outdir: str, steps: int, eta: float = 0.0, scale: float = 1.0, n_samples: int = 1
) -> None:
    """Add what all scripts share that draw from files: samples of each, folder, model, sampler, size, device."""
    add = parser.add_argument
    add("-n", "--n_samples", type=int, default=n_samples, help=f"pictures of each input (default {n_samples})")
    add("--outdir", default=outdir, help=f"where pictures go (default {outdir})")
    add_model_arguments(parser)
    add_sampler_arguments(parser, steps=steps, eta=eta, scale=scale)
    add_size_arguments(parser)
    add_device_arguments(parser)
    parser.set_defaults(columns=4)


def choose_device(name: str) -> torch.device:
    """Find a device by its name; `auto` is the accelerator if there is one. UserError if it cannot be used."""
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {name}: not usable on this machine ({reason}); use auto or cpu") from error
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the precision of --precision inside the block."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def choose_sampler(options: argparse.Namespace) -> Sampler:
    """Make the sampler that the arguments describe. UserError for an eta that it cannot use."""
    name, eta = options.sampler, options.ddim_eta
    if eta is not None and eta < 0:
        raise UserError(f"--ddim_eta {eta:g}: use 0 (no noise) or more")
    if name == "ddpm":  # takes all steps of its process
        return make_sampler(name)
    if name == "ddim":
        eta = options.default_eta if eta is None else eta
    elif eta:
        raise UserError(f"--ddim_eta {eta:g}: {name} has no eta; leave it out, or use --sampler ddim")
    return make_sampler(name, steps=options.ddim_steps, grid=options.grid, eta=eta if name == "ddim" else None)


def count_steps(sampler: Sampler, process: Process) -> int:
    """Return the number of steps that a sampler will make. UserError if it does not fit the process."""
    return len(sampler.times(process)) - 1


def model_source(options: argparse.Namespace) -> ModelSource:
    """Return the model that --run, --config, --ckpt and --raw ask for."""
    return ModelSource(options.run, options.config, options.ckpt, "raw" if options.raw else "ema")


def progress(total: int, what: str) -> tqdm:
    """Show count, rate and time left on stderr: often on a terminal, seldom in a log file."""
    return tqdm(total=total, desc=what, unit="step", mininterval=0.2 if sys.stderr.isatty() else 30.0)
