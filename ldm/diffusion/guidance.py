"""Denoiser to denoiser: classifier-free guidance, corrections of eps, and gradient guidance.

Ho & Salimans, eq. 6 (in the form u + s (c - u), so that s = 1 is no guidance); Dhariwal & Nichol, algorithm 2; section
4.4 / appendix C of the latent diffusion paper for guiding by the gradient of any log p(y | x_t).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoise, Denoised, x0_from_eps
from ldm.diffusion.process import Process

Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
LogProbability = Callable[[Tensor, Tensor], Tensor]


def classifier_free(denoise_pair: Denoise, scale: float) -> Denoise:
    """Extrapolate from the unconditional to the conditional prediction.

    `denoise_pair` has the conditioning of a batch 2B closed over, ordered [unconditional, conditional]; it is called
    once per step on x_t repeated twice.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return extrapolate(denoise_pair(*repeat_pair(x_t, t)), scale)

    return denoise


def repeat_pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t (2B, C, H, W) and t (2B,) for a batch of [unconditional, conditional] predictions."""
    return torch.cat([x_t, x_t]), torch.cat([t, t])


def extrapolate(pair: Denoised, scale: float) -> Denoised:
    """Return u + scale (c - u) for predictions (2B, C, H, W) in the order [unconditional u, conditional c]."""
    unconditional, conditional = (Denoised(*both) for both in zip(*(part.chunk(2) for part in pair), strict=True))
    return Denoised(*(u + scale * (c - u) for u, c in zip(unconditional, conditional, strict=True)))


def correct_epsilon(denoise: Denoise, process: Process, correction: Correction) -> Denoise:
    """Replace eps by correction(eps, x_t, t) and recompute x_0; where there is no signal, x_0 stays."""

    def corrected(x_t: Tensor, t: Tensor) -> Denoised:
        denoised, level = denoise(x_t, t), process.level(t)
        eps = correction(denoised.eps, x_t, t)
        return Denoised(torch.where(level.alpha > 0, x0_from_eps(eps, x_t, level), denoised.x0), eps)

    return corrected


def gradient(denoise: Denoise, process: Process, log_prob: LogProbability, scale: float) -> Denoise:
    """Guide by eps <- eps - sigma * scale * grad_x log_prob(x_t, t).

    `log_prob` maps x_t (B, C, H, W) and t (B,) to (B,), differentiably in x_t.
    """

    def correction(eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_(True)  # clones of inference tensors may have gradients
            (slope,) = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)
        return eps - process.level(t).sigma * scale * slope

    return correct_epsilon(denoise, process, correction)
