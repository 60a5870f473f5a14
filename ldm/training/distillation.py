"""Consistency distillation in latent space, with guidance in the student (Luo et al., arXiv 2310.04378, section 4).

A student f(x_t, t) learns to give at the start of a step of its teacher's walk what it gives at the end:
d(f(x_t, t), f(x_s, s)), x_s one guided step of DDIM from x_t, s the next time of a grid (the skipping of steps), the
second f without gradient. f is the x_0 of the network: of every prediction but `Sample` c_skip x + c_out F with
c_skip = 1, c_out = 0 at clean data; there f(x, 0) = x is used as it is, for all. A student needs no guidance, and is
drawn from by the sampler `consistency` in one or a few steps (Song et al., arXiv 2303.01469).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm.bounds import Count
from ldm.conditioning.base import Conditioning
from ldm.diffusion.grids import Grid, resolve_grid
from ldm.diffusion.objective import Error, Terms, error_of
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.evaluation.extractors import weights_hash
from ldm.models.guidance import Guidance, misfit
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_model
from ldm.transfer import sent
from ldm.weights.load import load_into


class ConsistencyDistillation:
    """The loss of a student, with its teacher, which is read from its run also where a training goes on.

    The student begins with all weights of the teacher; its conditioners stay as they are.
    """

    def __init__(
        self,
        teacher: str | Path | LatentDiffusion,
        guidance: float = 1.0,
        intervals: Count = 50,
        grid: Grid | str | None = None,
        loss: str | Error = "pseudo_huber",
    ) -> None:
        """Describe the distillation. Nothing is read yet.

        Args:
            teacher: Run folder, checkpoint, or model; averaged weights where there are any.
            guidance: Scale of the teacher's classifier-free guidance, which becomes part of the student; 1 is none.
            intervals: Steps of the teacher's walk from noise to data.
            grid: Grid of this walk, or its name (default: that of the process).
            loss: Error of an entry of x_0, as for an `Objective`.
        """
        self.source, self.guidance, self.intervals = teacher, guidance, intervals
        self.grid, self.error = grid, error_of(loss)
        self.teacher: LatentDiffusion | None = None

    def begin(self, model: LatentDiffusion) -> None:
        """Read the teacher, and give its weights to a model, whose conditioners freeze; on the meta device, check.

        UserError for a teacher that cannot be guided so, and for a model of another kind.
        """
        if self.guidance != 1 and model.cond_stage_model is None:
            raise UserError(f"guidance: is {self.guidance:g}, but the model has no condition; set it to 1")
        if (steps := model.process.num_steps) is not None and self.intervals > steps:
            raise UserError(f"intervals: is {self.intervals}, but the process has {steps} steps; use as many or fewer")
        if model.device.type != "meta":
            self.teacher = self._read()
            self._check(model)
        for part in model.conditioners():
            part.requires_grad_(False).eval()

    def _read(self) -> LatentDiffusion:
        """Return the teacher. UserError if its conditions were never dropped in training, where it has to be guided."""
        if isinstance(self.source, LatentDiffusion):
            return self.source
        loaded = load_model(self.source)
        if self.guidance != 1 and "training" in loaded.content and not loaded.model.drops_conditions:
            raise UserError(
                f"guidance: is {self.guidance:g}, but {self.source} never dropped its condition in training "
                "(drop_rate 0), and knows no null condition; set guidance to 1, or train it with drop_rate 0.1"
            )
        return loaded.model

    def _check(self, model: LatentDiffusion) -> None:
        teacher, names = self.teacher, [type(one.prediction).__name__ for one in (model, self.teacher)]
        Guidance(self.guidance).ready(teacher)
        if model.prediction != teacher.prediction:
            raise UserError(f"teacher: predicts {names[1]}, the model {names[0]}; take its section model as it is")
        load_into(model, teacher.state_dict(), source=f"teacher {self._name}")
        if (problem := misfit(teacher, model)) is not None:
            raise UserError(f"teacher: {problem}; take its section model as it is")

    @property
    def _name(self) -> str:
        return type(self.source).__name__ if isinstance(self.source, LatentDiffusion) else str(self.source)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of the teacher's weights."""
        return weights_hash(self.teacher)

    def to(self, device: torch.device) -> ConsistencyDistillation:
        """Move the teacher, and return this."""
        self.teacher.to(device)
        return self

    @cached_property
    def times(self) -> Tensor:
        """The times of the teacher's walk, float64 (N + 1,), falling."""
        process = self.teacher.process
        return resolve_grid(self.grid or process.grid)(process, self.intervals)

    def ends(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and end (B,) of the intervals at places u (B,) in [0, 1) of the walk, the noisiest last."""
        count = len(self.times) - 1
        index = count - 1 - (u.double() * count).long().clamp(max=count - 1)
        return self.times[index].float(), self.times[index + 1].float()

    def __call__(
        self, model: LatentDiffusion, z: Tensor, conditioning: Conditioning | None, u: Tensor, eps: Tensor
    ) -> Terms:
        """Return the loss for scaled latents z with noise eps (B, c, h, w), at places u (B,) in [0, 1) of the walk."""
        process, student = model.process, model.denoiser(conditioning)
        t, s = (sent(times, z.device) for times in self.ends(u))
        z_t = process.level(t).diffuse(z, eps)
        with torch.no_grad():
            z_s = process.level(s).diffuse(*self.teacher.denoiser(conditioning, self.guidance)(z_t, t))
            target = consistent(student, process, z_s, s)
        error = self.error(student(z_t, t).x0 - target).flatten(1).mean(1)  # (B,)
        return Terms(error.mean(), error, None, error.mean())


def consistent(student: Denoise, process: Process, x: Tensor, t: Tensor) -> Tensor:
    """Return f(x, t), the end of the flow through x (B, C, H, W) at times t (B,): x itself where that is clean data."""
    is_clean = t <= process.clean
    x0 = student(x, torch.where(is_clean, process.noisiest, t)).x0  # networks are not told the time of clean data
    return torch.where(is_clean[:, None, None, None], x, x0)
