"""Adapters of the samplers: ancestral, DDIM, PLMS."""

from collections.abc import Iterator

import torch

from ldm.conditioning.base import Conditioning
from ldm.diffusion.guidance import classifier_free, correct_epsilon
from ldm.sampling.base import Step, identity, identity_constrain, intervals_of, keep_known, scaled_noise
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.plms import PLMS

from .case import Case, Tape
from .latent import conditioning

GRIDS = {"uniform": "compvis", "quad": "compvis_quad"}
LOG_EVERY = 5  # of recordings that do not say; those of the pixel model follow its config
SAMPLER_ARGS = "kind S eta log_every_t scale cond uncond via discretize quantize_x0 temperature timesteps corrector"


def denoiser(case: Case, model):
    """Wrap guidance and correction around the model as the case asks."""
    cond, args = conditioning(case, case.args.get("cond")), case.args
    denoise, scale = model.denoiser(cond), args.get("scale", 1.0)
    if args.get("uncond") is not None and scale != 1.0:
        both = Conditioning.stack([conditioning(case, args["uncond"]), cond])
        denoise = classifier_free(model.denoiser(both), scale)
    if args.get("corrector"):
        denoise = correct_epsilon(denoise, model.process, lambda eps, x, t: eps + 0.1 * x)
    return denoise


def constraint(case: Case, model, tape: Tape):
    if "mask" not in case.inputs:
        return identity_constrain
    return keep_known(case.inputs["x0"], case.inputs["mask"], model.process, tape.noise("q_sample"))


def build(case: Case, process):
    """Make the sampler; `timesteps` is the reference's way, one short, to take the end of a grid."""
    args = case.args
    grid = GRIDS[args.get("discretize", "uniform")]
    make = PLMS(args["S"], grid) if args["kind"] == "plms" else DDIM(args["S"], args.get("eta", 0.0), grid)
    if args.get("timesteps") is None:
        return make
    total = len(make.times(process)) - 1
    start = int(min(args["timesteps"] / total, 1) * total) - 1
    return type(make)(**{**vars(make), "start": start})


@torch.no_grad()
def sampler(case: Case, tmp_path) -> dict:
    case.allow_args(*SAMPLER_ARGS.split())
    args, model, tape = case.args, case.model().model, case.tape()
    quantize = model.first_stage_model.quantize.nearest_codes if args.get("quantize_x0") else identity
    make = build(case, model.process)
    x = case.inputs["x_T"] if "x_T" in case.inputs else tape.take()
    walk = make(
        denoiser(case, model),
        x,
        model.process,
        refine=quantize,
        constrain=constraint(case, model, tape),
        noise=scaled_noise(tape.noise("p_sample_ddim"), args.get("temperature", 1.0)),
    )
    steps = list(walk)
    every = args.get("log_every_t", LOG_EVERY)
    kept = [step for i, step in enumerate(steps) if i == 0 or (len(steps) - i - 1) % every == 0]
    return vectors(case, model.process) | {
        "samples": steps[-1].x,
        "x_inter": torch.stack([x, *(step.x for step in kept)]),
        "pred_x0": torch.stack([x, *(step.x0 for step in kept)]),
    }


def vectors(case: Case, process) -> dict:
    """Return the tables that the reference keeps beside a sampler, also for PLMS, which shares its grid with DDIM."""
    eta, grid = case.args.get("eta", 0.0), GRIDS[case.args.get("discretize", "uniform")]
    walk = intervals_of(DDIM(case.args["S"], grid=grid).times(process), process)[::-1]
    full = intervals_of(DDPM().times(process), process)[::-1]
    table = {
        "timesteps": [int(step.t) for step in walk],
        "alphas": [step.alpha**2 for step in walk],
        "alphas_prev": [step.next_alpha**2 for step in walk],
        "sigmas": [eta * step.posterior_std for step in walk],
        "sqrt_one_minus_alphas": [step.sigma for step in walk],
        "sigmas_for_original_num_steps": [eta * step.posterior_std for step in full],
    }
    return {f"ddim_{name}": torch.tensor(values) for name, values in table.items()}


@torch.no_grad()
def ancestral(case: Case, tmp_path) -> dict:
    case.allow_args("cond", "clip")
    is_latent = case.config["target"].endswith("LatentDiffusion")
    return (_ancestral_latent if is_latent else _ancestral_pixel)(case, case.model().model, case.tape())


def clip(x0: torch.Tensor) -> torch.Tensor:
    return x0.clamp(-1, 1)


def _moments(model, denoise, x, t, refine) -> tuple:
    x0 = refine(denoise(x, t).x0)
    return (*model.process.posterior(x0, x, t), x0)


def _p_sample(model, denoise, x, t, refine, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a draw from the posterior and x0, sample i at its own step t[i] (B,); the last step is its mean."""
    mean, _, log_variance, x0 = _moments(model, denoise, x, t, refine)
    return mean + torch.exp(0.5 * log_variance).masked_fill((t == 0)[:, None, None, None], 0.0) * noise, x0


def _logged(steps: list[Step], every: int) -> Iterator[Step]:
    return (step for i, step in enumerate(steps) if i == 0 or step.t % every == 0)


def _ancestral_pixel(case: Case, model, tape: Tape) -> dict:
    denoise, x, t = model.denoiser(None), case.inputs["x"], case.inputs["t"]
    refine = clip if case.args.get("clip") else identity
    in_loop = clip if case.params.get("clip_denoised", True) else identity
    noise = tape.noise("p_sample")
    results = {"p_mean_variance": _moments(model, denoise, x, t, refine)[:3]}
    results["p_sample"] = _p_sample(model, denoise, x, t, refine, noise(x.shape))[0]
    results["p_sample_repeat"] = _p_sample(model, denoise, x, t, refine, noise((1, *x.shape[1:])))[0]
    start = tape.take("p_sample_loop")
    steps = list(DDPM()(denoise, start, model.process, refine=in_loop, noise=noise))
    logged = _logged(steps, case.params.get("log_every_t", 100))
    results["loop"] = (steps[-1].x, [start, *(step.x for step in logged)])
    start = tape.take("p_sample_loop")
    *_, last = DDPM()(denoise, start, model.process, refine=in_loop, noise=noise)
    return results | {"sample": last.x}


def _ancestral_latent(case: Case, model, tape: Tape) -> dict:
    denoise, x, t = denoiser(case, model), case.inputs["x"], case.inputs["t"]
    refine = clip if case.args.get("clip") else identity
    noise, constrain = tape.noise("p_sample"), constraint(case, model, tape)
    results = {"p_mean_variance": _moments(model, denoise, x, t, refine)}
    results["p_sample"] = _p_sample(model, denoise, x, t, refine, noise(x.shape))

    def walk(start, constrain) -> list[Step]:
        return _constrained_after(DDPM(), denoise, start, model.process, constrain, noise)

    steps = walk(x, constrain)
    results["loop"] = (steps[-1].x, [x, *(step.x for step in _logged(steps, LOG_EVERY))])
    steps = walk(x, constrain)
    results["progressive"] = (steps[-1].x, [step.x0 for step in _logged(steps, LOG_EVERY)])
    results["sample"] = walk(tape.take("p_sample_loop"), identity_constrain)[-1].x
    return results


def _constrained_after(sampler, denoise, start, process, constrain, noise) -> list[Step]:
    """Walk as the reference does, which constrains after each step, at the level that was left.

    That is before the next step, at the time before it, and once more after the last.
    """
    states = []

    def before_next(x_t, t):
        if int(t[0]) + 1 == process.num_steps:
            return x_t
        states.append(constrain(x_t, (t + 1).long()))
        return states[-1]

    steps = list(sampler(denoise, start, process, constrain=before_next, noise=noise))
    states.append(constrain(steps[-1].x, torch.zeros(len(start), dtype=torch.long)))
    return [step._replace(x=state) for step, state in zip(steps, states, strict=True)]


ADAPTERS = {"sampler": sampler, "ancestral": ancestral}
