"""How the samples of a trial are drawn: sampler and guidance that its settings name, checked before a training."""

from __future__ import annotations

from ldm.ablation.study import EvaluationSpec, Sampling, make
from ldm.errors import UserError
from ldm.models.guidance import Guidance, average_of
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource
from ldm.sampling import make_sampler
from ldm.sampling.base import Sampler


def sampler(sampling: Sampling, steps: int) -> Sampler:
    """Return the sampler. UserError for an unknown one, and for options that it does not have."""
    name = sampling.sampler
    return make_sampler(name, steps=None if name == "ddpm" else steps, eta=sampling.eta, grid=sampling.grid)


def guidance(sampling: Sampling, source: ModelSource | None = None) -> Guidance:
    """Return the guidance; its guide is found where the model is known. UserError for what guidance cannot be."""
    given = dict(sampling.guidance)
    if "scale" in given:
        raise UserError("sample.guidance.scale: is the field scale of sample itself; write sample.scale")
    guide = given.pop("guide", None)
    if guide is not None and source is not None:
        guide = source.guide(guide)
    return make(Guidance, {"scale": sampling.scale, "guide": guide, **given}, "sample.guidance")


def check_sampling(spec: EvaluationSpec, sampling: Sampling, model: LatentDiffusion, averages: list[str]) -> None:
    """Raise UserError for samples that a model cannot draw: numbers of steps, guidance, weights, sizes.

    averages: names of the averages that its training keeps beside the usual one.
    """
    guide = guidance(sampling).guide
    if sampling.scale != 1 and guide is None and not any(model.conditioners()):
        raise UserError(f"sample.scale is {sampling.scale:g}; a model without conditions has no guidance")
    for steps in spec.all_steps:
        sampler(sampling, steps).times(model.process)
    for key, name in (("weights", sampling.weights), ("guidance.guide", average_of(guide))):
        if name is not None and name not in (known := ["ema", "raw", *averages]):
            raise UserError(
                f"sample.{key}: there is no average {name}; use one of {', '.join(known)}, or add it to "
                "latent.training.params.averages"
            )
    for name, side in (("H", sampling.H), ("W", sampling.W)):
        if side is not None and side % model.side_multiple:
            raise UserError(f"sample.{name} is {side}; these models need multiples of {model.side_multiple}")
