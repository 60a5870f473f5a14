"""Adapters of the first stage: autoencoders, quantisers, the diagonal Gaussian."""

import numpy as np
import torch

from ldm.autoencoder.regularizers import DiagonalGaussian, normal_kl

from .case import Case


def describe(posterior: DiagonalGaussian) -> dict:
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "var": posterior.var,
        "mode": posterior.mode(),
        "kl": posterior.kl(),
    }


def gaussian(case: Case, tmp_path) -> dict:
    case.allow_args()
    noise, z = case.tape().noise("sample"), case.inputs["z"]
    p, q = DiagonalGaussian(case.inputs["p"]), DiagonalGaussian(case.inputs["q"])
    point = DiagonalGaussian(case.inputs["p"], deterministic=True)
    return describe(p) | {
        "sample": p.sample(noise),
        "kl_other": p.kl(q),
        "nll": p.nll(z),
        "nll_dims": p.nll(z, dims=[1]),
        "normal_kl": normal_kl(p.mean, p.logvar, q.mean, q.logvar),
        "normal_kl0": normal_kl(p.mean, p.logvar, 0.0, 0.0),
        "det_sample": point.sample(noise),
        "det_std": point.std,
        "det_kl": point.kl(),
        "det_nll": point.nll(z),
    }


@torch.no_grad()
def kl(case: Case, tmp_path) -> dict:
    case.allow_args()
    autoencoder, noise, x = case.model().model, case.tape().noise("sample"), case.inputs["x"]
    posterior = autoencoder.posterior(x)
    sample = posterior.sample(noise)
    return describe(posterior) | {
        "moments": autoencoder.moments(x),
        "sample": sample,
        "nll": posterior.nll(case.inputs["z"]),
        "decode": autoencoder.decode(case.inputs["z"]),
        "rec_sample": autoencoder(x, noise)[0],
        "rec_mode": autoencoder.decode(autoencoder.encode_mode(x)),
        "last_layer": autoencoder.last_layer,
    }


def codes_shape(z: torch.Tensor) -> tuple[int, int, int, int]:
    """Give (B, H, W, C) of z (B, C, H, W), the shape in which the codes of flat indices are laid out."""
    return len(z), *z.shape[2:], z.shape[1]


def vq(case: Case, tmp_path) -> dict:
    case.allow_args()
    extra = {}
    if "used" in case.inputs:
        np.save(tmp_path / "used.npy", case.inputs["used"].numpy())
        extra["remap"] = str(tmp_path / "used.npy")
    autoencoder = case.model(**extra).model
    quantizer, x = autoencoder.quantize, case.inputs["x"]
    with torch.no_grad():
        prequant = autoencoder.encode(x)
        quant, loss, info = quantizer(prequant)
        dec, diff, dec_info = autoencoder(x)
    return _quantizer(case, quantizer) | {
        "prequant": prequant,
        "quant": quant,
        "loss": loss,
        "indices": info["indices"],
        "decode": autoencoder.decode(case.inputs["z"], quantize=False),
        "dec": dec,
        "diff": diff,
        "ind": dec_info["indices"],
        "entry": quantizer.codes(info["indices"], codes_shape(quant)),
    }


def _quantizer(case: Case, quantizer: torch.nn.Module) -> dict:
    z = case.inputs["z"].clone().requires_grad_(True)
    zq, loss, info = quantizer(z)
    (straight_through,) = torch.autograd.grad((zq * case.cotangent(zq)).sum(), z, retain_graph=True)
    codebook, latent = torch.autograd.grad(loss, (quantizer.embedding.weight, z))
    return {
        "zq": zq,
        "zq_loss": loss,
        "zq_idx": info["indices"],
        "st_grad": straight_through,
        "loss_grad_codebook": codebook,
        "loss_grad_z": latent,
    }


@torch.no_grad()
def vq_interface(case: Case, tmp_path) -> dict:
    case.allow_args()
    autoencoder, z = case.model().model, case.inputs["z"]
    return {
        "encode": autoencoder.encode(case.inputs["x"]),
        "decode": autoencoder.decode(z),
        "decode_raw": autoencoder.decode(z, quantize=False),
    }


ADAPTERS = {"gaussian": gaussian, "kl": kl, "vq": vq, "vq_interface": vq_interface}
