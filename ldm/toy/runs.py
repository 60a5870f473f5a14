"""Runs of the toy world: load one, and sample a whole batch of conditions from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import shipped
from ldm.models.generate import Request, generate
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import LoadedModel, load_model
from ldm.sampling import make_sampler

CONFIGS = shipped.folder() / "demo"
Progress = Callable[[int, str], AbstractContextManager[Any]]  # of a number of steps and a title; has `update()`


@dataclass(frozen=True)
class Sampling:
    """How to sample: steps, scale of classifier-free guidance, samples at a time, name of the sampler."""

    steps: int = 50
    scale: float = 1.0
    batch_size: int = 50
    sampler: str = "ddim"


def load_run(run: Path, device: torch.device) -> LoadedModel:
    """Load the averaged weights of a run."""
    return load_model(run, device)


def sample_all(
    model: LatentDiffusion, conditions: Mapping[str, Any], size: tuple[int, int], sampling: Sampling, progress: Progress
) -> Tensor:
    """Return one image for each entry of the conditions, seeds 0, 1, ...: (N, C, H, W) in [-1, 1] on the CPU."""
    count = len(next(iter(conditions.values())))
    request = Request(range(count), size, conditions, sampling.scale, sampling.batch_size)
    sampler = make_sampler(sampling.sampler, steps=sampling.steps)
    with progress(-(-count // sampling.batch_size) * sampling.steps, f"{count} samples") as bar:
        parts = list(generate(model, sampler, request, lambda step: bar.update()))
    return torch.cat(parts).clamp(-1, 1).cpu()
