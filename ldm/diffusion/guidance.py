"""Denoiser to denoiser: guidance away from a second prediction, corrections of eps, and gradient guidance.

A rule joins two predictions of x_0, that toward which and that away from which is guided. Classifier-free guidance
extrapolates from the second to the first (Ho & Salimans, eq. 6, in the form u + s (c - u), so that s = 1 is no
guidance); where the second comes from a weaker model, that is autoguidance (Karras et al., arXiv 2406.02507, eq. 3).
Rules are wrapped: adaptive projected guidance (Sadat et al., arXiv 2410.02416, section 4), rescaling (Lin et al.,
arXiv 2305.08891, section 3.4). An interval limits any of them to some times (Kynkaanniemi et al., arXiv 2404.07724).
Gradient guidance: Dhariwal & Nichol, algorithm 2; section 4.4 / appendix C of the latent diffusion paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoise, Denoised, eps_from_x0, x0_from_eps
from ldm.diffusion.process import Process

Pair = Callable[[Tensor, Tensor], tuple[Denoised, Denoised]]  # x_t, t -> predictions toward and away from
Rule = Callable[[Tensor, Tensor], Tensor]  # predictions (B, C, H, W) toward and away from -> the guided one
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
LogProbability = Callable[[Tensor, Tensor], Tensor]
_PER_SAMPLE = (1, 2, 3)  # dimensions of one
_TINY = 1e-24


def in_one_batch(denoise: Denoise) -> Pair:
    """Make both predictions by one call on x_t repeated twice.

    `denoise` has the conditioning of a batch 2B closed over, in the order [away from, toward].
    """

    return lambda x_t, t: halves(denoise(torch.cat([x_t, x_t]), torch.cat([t, t])))


def halves(both: Denoised) -> tuple[Denoised, Denoised]:
    """Return the predictions toward and away from, of a batch 2B in the order [away from, toward]."""
    away, toward = zip(*(part.chunk(2) for part in both), strict=True)
    share = None if both.share is None else both.share.chunk(2)[1]
    return Denoised(*toward).with_share(share), Denoised(*away)


def extrapolate(toward: Denoised, away: Denoised, scale: float) -> Denoised:
    """Apply the linear rule to both predictions, which keeps x_0 and eps together."""
    return Denoised(*map(extrapolation(scale), toward, away)).with_share(toward.share)


def classifier_free(denoise_pair: Denoise, scale: float) -> Denoise:
    """Guide by the linear rule, both predictions being made by one call (see `in_one_batch`)."""
    return extrapolated(in_one_batch(denoise_pair), scale)


def extrapolation(scale: float) -> Rule:
    """Return the linear rule: away + scale (toward - away)."""
    return lambda toward, away: away + scale * (toward - away)


def extrapolated(pair: Pair, scale: float) -> Denoise:
    """Guide by the linear rule."""
    return lambda x_t, t: extrapolate(*pair(x_t, t), scale)


def guided(pair: Pair, rule: Rule, process: Process) -> Denoise:
    """Guide by any rule, on x_0; eps follows from it."""

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        toward, away = pair(x_t, t)
        x0 = rule(toward.x0, away.x0)
        return Denoised(x0, eps_from_x0(x0, x_t, process.level(t))).with_share(toward.share)

    return denoise


def projected(rule: Rule, eta: float, norm: float, momentum: float) -> Rule:
    """Wrap a rule for one walk: the difference of the predictions is averaged, shortened and turned before it is used.

    eta: share that is kept of what is parallel to `toward`; norm: largest length of a sample's difference; momentum:
    share of the former differences that is added, negative to leave out what was guided already.
    """
    former: Tensor | None = None

    def projected_rule(toward: Tensor, away: Tensor) -> Tensor:
        nonlocal former
        difference = toward - away
        if former is not None:
            difference = difference + momentum * former
        former = difference
        length = difference.square().sum(_PER_SAMPLE, keepdim=True).sqrt()
        difference = difference * (norm / length).clamp(max=1.0)
        power = toward.square().sum(_PER_SAMPLE, keepdim=True).clamp(min=_TINY)
        parallel = (difference * toward).sum(_PER_SAMPLE, keepdim=True) / power * toward
        return rule(toward, toward - (difference - (1 - eta) * parallel))

    return projected_rule


def rescaled(rule: Rule, phi: float) -> Rule:
    """Wrap a rule: its result gets, to a share phi, the standard deviation of `toward` in each sample."""

    def rescaled_rule(toward: Tensor, away: Tensor) -> Tensor:
        x0 = rule(toward, away)
        ratio = toward.std(_PER_SAMPLE, keepdim=True) / x0.std(_PER_SAMPLE, keepdim=True)
        return x0 * (phi * ratio + 1 - phi)

    return rescaled_rule


def within(denoise: Denoise, otherwise: Denoise, earliest: float, latest: float) -> Denoise:
    """Use a denoiser at times from `earliest` to `latest`, and another one before and after; samples share a time.

    The times of a sampler know their value `on_host`; for others one waits for the device.
    """

    def limited(x_t: Tensor, t: Tensor) -> Denoised:
        time = t[0].item() if (known := getattr(t, "on_host", None)) is None else known
        return (denoise if earliest <= time <= latest else otherwise)(x_t, t)

    return limited


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
