"""Every step against that of diffusers' scheduler, with the same network, noise and times, in double precision."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.prediction import Denoised, Epsilon, Flow, eps_from_x0
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.sampling import make_sampler

schedulers = pytest.importorskip("diffusers.schedulers")

PROCESS = DiscreteVP.linear(1000, 0.00085, 0.012)
STEPS = [5, 20, 50]
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
# sampler, options, scheduler, its options; whether the scheduler walks x / alpha instead of x
CASES = [
    ("ddim", {"eta": 0.0}, "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, False),
    ("ddpm", {}, "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}, False),
    ("euler", {}, "EulerDiscreteScheduler", {}, True),
    ("euler_ancestral", {}, "EulerAncestralDiscreteScheduler", {}, True),
    *[("dpm_solver", {"order": k}, "DPMSolverMultistepScheduler", {"solver_order": k}, False) for k in (1, 2, 3)],
    *[
        ("dpm_solver_sde", {"order": k}, "DPMSolverMultistepScheduler",
         {"solver_order": k, "algorithm_type": "sde-dpmsolver++"}, False)
        for k in (1, 2)  # the third order of diffusers has a slip of sign; see test_walks
    ],
    *[("unipc", {"order": k}, "UniPCMultistepScheduler", {"solver_order": k, "final_sigmas_type": "zero"}, False)
      for k in (1, 2, 3)],
]  # fmt: skip


def network(x, t):
    """Return some eps that is not linear in x."""
    return 0.9 * torch.tanh(1.3 * x + 0.2 * torch.sin(t / 100))


def denoiser(process):
    def denoise(x, t):
        level = process.level(t)
        power = (level.alpha**2 + level.sigma**2) ** 0.5
        prediction = Flow() if isinstance(process, RectifiedFlow) else Epsilon()
        return prediction.denoised(network(x / power, t.view(-1, 1, 1, 1)), x, level)

    return denoise


def first(process):
    draw = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return process.prior_std * draw


def draws(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def ours(name, process, steps, **options):
    sampler = make_sampler(name, steps=steps, **options)
    walk = sampler(denoiser(process), first(process), process, noise=draws())
    return [step.x for step in walk], sampler.times(process)


def scheduler_on(kind, options, steps, times, process):
    """Make a scheduler that has the levels of our walk in double precision."""
    scheduler = getattr(schedulers, kind)(**TRAINED, **options)
    scheduler.set_timesteps(steps)
    level = process.level(times)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = (level.sigma / level.alpha).flatten()
    abar = PROCESS.tables["alphas_cumprod"].double()
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = abar, torch.tensor(1.0, dtype=torch.float64)
    scheduler.one = scheduler.final_alpha_cumprod
    assert scheduler.timesteps.tolist() == times[:-1].tolist()
    return scheduler


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "options", "kind", "theirs", "is_scaled"), CASES)
def test_steps_are_those_of_diffusers(name, options, kind, theirs, is_scaled, steps):
    found, times = ours(name, PROCESS, steps, grid="trailing", **options)
    scheduler, noise, generator = scheduler_on(kind, theirs, steps, times, PROCESS), draws(), None
    alpha = PROCESS.level(times).alpha.flatten().tolist()
    x = first(PROCESS)
    for i, t in enumerate(scheduler.timesteps):
        eps = network(x, torch.full((1, 1, 1, 1), float(t), dtype=torch.float64))
        extra = {}
        if "sde" in name:
            extra["variance_noise"] = noise(x.shape)
        elif name in ("ddpm", "euler_ancestral"):
            generator = generator or torch.Generator().manual_seed(1)
            extra["generator"] = generator
        state = x / alpha[i] if is_scaled else x
        scheduler.scale_model_input(state, t)
        stepped = scheduler.step(eps, t, state, **extra).prev_sample
        stepped = stepped * alpha[i + 1] if is_scaled else stepped
        torch.testing.assert_close(found[i], stepped.double(), atol=1e-5, rtol=0)
        x = found[i]  # some of theirs round to single precision, which would add up


@pytest.mark.parametrize("steps", STEPS)
def test_learned_variances_are_those_of_diffusers(steps):
    def says_variance(x, t):
        return denoiser(PROCESS)(x, t).with_share((torch.sin(7 * x) + 1) / 2)

    sampler = make_sampler("ddpm", steps=steps, grid="trailing")
    found = [step.x for step in sampler(says_variance, first(PROCESS), PROCESS, noise=draws())]
    options = {"clip_sample": False, "variance_type": "learned_range"}
    scheduler = scheduler_on("DDPMScheduler", options, steps, sampler.times(PROCESS), PROCESS)
    x, generator = first(PROCESS), torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        eps = network(x, torch.full((1, 1, 1, 1), float(t), dtype=torch.float64))
        output = torch.cat([eps, torch.sin(7 * x)], dim=1)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        torch.testing.assert_close(found[i], x, atol=1e-5, rtol=0)
        x = found[i]
    # The last step is to clean data, which is the prediction; theirs adds noise there unless it begins at t = 0.
    last = denoiser(PROCESS)(x, torch.full((len(x),), float(scheduler.timesteps[-1]), dtype=torch.float64))
    torch.testing.assert_close(found[-1], last.x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("kind", "process"), [("HeunDiscreteScheduler", EDM()), ("FlowMatchHeunDiscreteScheduler", RectifiedFlow())]
)
def test_heun_is_that_of_diffusers(kind, process, steps):
    found, times = ours("heun", process, steps)
    scheduler = getattr(schedulers, kind)()
    scheduler.set_timesteps(steps)
    once = process.level(times).sigma.flatten()
    scheduler.sigmas = torch.cat([once[:1], once[1:-1].repeat_interleave(2), once[-1:]])
    at = torch.cat([times[:1], times[1:-1].repeat_interleave(2)])
    x, states = first(process), []
    for i, t in enumerate(at):
        x0, eps = denoiser(process)(x, t.expand(2))
        x = scheduler.step(eps if process.prior_std > 1 else eps - x0, scheduler.timesteps[i], x).prev_sample
        states.append(x)
    for mine, theirs in zip(found, states[1::2] + states[-1:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * process.prior_std, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_on_a_flow_is_that_of_diffusers(steps):
    process = RectifiedFlow()
    found, times = ours("euler", process, steps)
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas, x = times, first(process)
    for i, t in enumerate(scheduler.timesteps):
        x0, eps = denoiser(process)(x, times[i].expand(2))
        x = scheduler.step(eps - x0, t, x).prev_sample.double()
        torch.testing.assert_close(found[i], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_consistency_steps_are_those_of_diffusers(steps):
    """The scalings at the boundary belong to the network of a student."""
    scheduler = schedulers.LCMScheduler(**{**TRAINED, "timestep_spacing": "leading"}, clip_sample=False)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = PROCESS.tables["alphas_cumprod"].double()
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    times = torch.cat([scheduler.timesteps, torch.tensor([-1])]).double()

    def student(x, t):
        skip, out = (c.view(-1, 1, 1, 1) for c in scheduler.get_scalings_for_boundary_condition_discrete(t.double()))
        x0 = skip * x + out * denoiser(PROCESS)(x, t).x0
        return Denoised(x0, eps_from_x0(x0, x, PROCESS.level(t)))

    sampler = make_sampler("consistency", steps=steps, grid=lambda process, steps: times)
    found = [step.x for step in sampler(student, first(PROCESS), PROCESS, noise=draws())]
    x, generator = first(PROCESS), torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        eps = network(x, torch.full((1, 1, 1, 1), float(t), dtype=torch.float64))
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
        torch.testing.assert_close(found[i], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"s_churn": 20.0}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}]
)
@pytest.mark.parametrize("steps", STEPS)
def test_churn_is_algorithm_2_of_edm(steps, options):
    process = EDM()
    found, times = ours("heun", process, steps, **options)
    s_noise, noise, x = options.get("s_noise", 1.0), draws(), first(process)

    def slope(x, t):
        return denoiser(process)(x, torch.full((2,), t, dtype=torch.float64)).eps

    for i, (t, after) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        is_between = options.get("s_tmin", 0.0) <= t <= options.get("s_tmax", float("inf"))
        gamma = min(options["s_churn"] / steps, 2**0.5 - 1) if is_between else 0.0
        hat = min(t * (1 + gamma), process.noisiest)  # a network knows no more noise than that
        if hat > t:
            x = x + (hat**2 - t**2) ** 0.5 * s_noise * noise(x.shape)
        d = slope(x, hat)
        ahead = x + (after - hat) * d
        x = ahead if after == 0 else x + (after - hat) * (d + slope(ahead, after)) / 2
        torch.testing.assert_close(found[i], x, atol=1e-6 * process.prior_std, rtol=0)
