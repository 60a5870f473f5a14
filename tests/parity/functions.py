"""Adapters of plain functions, of the bounding-box tokens and of the image degradations."""

import math

from ldm.autoencoder import losses
from ldm.autoencoder.regularizers import measure_perplexity
from ldm.data.image_pairs import kernels
from ldm.data.image_pairs.degradation import RandomStates, bsrgan, bsrgan_light
from ldm.diffusion import discrete as schedule
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.grids import Compvis, CompvisQuad
from ldm.networks.compvis_extras import sinusoidal_embedding
from ldm.networks.embeddings import timestep_embedding

from .case import Case, flatten


def make_beta_schedule(kind, n_timestep, linear_start=1e-4, linear_end=2e-2, cosine_s=8e-3):
    if kind == "cosine":
        return schedule.cosine_betas(n_timestep, cosine_s)
    make = {"linear": schedule.linear_betas, "sqrt_linear": schedule.sqrt_linear_betas, "sqrt": schedule.sqrt_betas}
    return make[kind](n_timestep, linear_start, linear_end)


def make_ddim_timesteps(method, num_steps, total, verbose=True):
    grid = {"uniform": Compvis(), "quad": CompvisQuad()}[method]
    return grid(DiscreteVP.linear(total), num_steps)[:-1].flip(0).long()


def imresize_np(img, scale, antialiasing=True):
    return kernels.bicubic_resize(img, scale, antialiasing)


def fspecial(kind, size, sigma):
    assert kind == "gaussian"
    return kernels.gaussian_kernel(size, sigma)


def anisotropic_gaussian(ksize=15, theta=math.pi, l1=6.0, l2=6.0):
    return kernels.anisotropic_gaussian_kernel(ksize, theta, l1, l2)


FUNCTIONS = {
    "make_beta_schedule": make_beta_schedule,
    "make_ddim_timesteps": make_ddim_timesteps,
    "timestep_embedding": timestep_embedding,
    "get_timestep_embedding": sinusoidal_embedding,
    "hinge_d_loss": losses.hinge_d_loss,
    "vanilla_d_loss": losses.vanilla_d_loss,
    "hinge_d_loss_with_exemplar_weights": losses.hinge_d_loss_with_exemplar_weights,
    "measure_perplexity": measure_perplexity,
    "imresize_np": imresize_np,
    "fspecial": fspecial,
    "anisotropic_Gaussian": anisotropic_gaussian,
    "shift_pixel": kernels.shift_kernel,
}


def func(case: Case, tmp_path) -> dict:
    case.allow_args("calls")
    results = {}
    for i, call in enumerate(case.args["calls"]):
        args = [_argument(case, value) for value in call.get("args") or ()]
        kwargs = {name: _argument(case, value) for name, value in (call.get("kwargs") or {}).items()}
        results |= dict(flatten(FUNCTIONS[call["name"]](*args, **kwargs), f"out{i}"))
    return results


def _argument(case: Case, value):
    """Resolve $x to a tensor of the case and #$x to the same as a numpy array."""
    if not isinstance(value, str) or "$" not in value:
        return value
    tensor = case.inputs[value.split("$", 1)[1]]
    return tensor.numpy() if value.startswith("#") else tensor


def degradation(case: Case, tmp_path) -> dict:
    case.allow_args("seeds", "sf")
    make = bsrgan_light if "light" in case.name else bsrgan
    degrade, image = make(case.args.get("sf", 4)), case.inputs["image"].numpy()
    return {f"seed{seed}": degrade(image, RandomStates.seeded(seed)) for seed in case.args["seeds"]}


ADAPTERS = {"func": func, "degradation": degradation}
