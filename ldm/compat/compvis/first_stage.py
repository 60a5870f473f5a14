"""CompVis first stages -> ours: autoencoders, quantisers, training losses.

An autoencoder that is the whole model is one to be trained (AutoencoderTraining); inside a LatentDiffusion it is the
frozen first stage (Autoencoder), whose training loss plays no part.
"""

import logging
from typing import Any

from ldm.compat.compvis.encoder_decoder import ALL_OF_A_PAIR, architecture
from ldm.compat.compvis.params import Node, Params, Translate, node, renaming, unavailable

log = logging.getLogger(__name__)

_LOSSES = "ldm.autoencoder.losses"
_EMA_DECAY = 0.9999

AUTOENCODERS = (
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface",
    "taming.models.vqgan.VQModel",
)
IDENTITY = "ldm.models.autoencoder.IdentityFirstStage"
NO_LOSS = ("torch.nn.Identity", "torch.nn.modules.linear.Identity")
DUMMY_LOSSES = (
    "ldm.modules.losses.contperceptual.DummyLoss",
    "ldm.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.DummyLoss",
)


def _autoencoder(p: Params) -> Node:
    """Translate the network part of a first stage, with the weights that it is to be filled with."""
    inner = p.inside("ddconfig")
    arch = architecture(inner, *ALL_OF_A_PAIR)
    is_kl = "AutoencoderKL" in p.target
    reason = "a KL posterior has mean and variance" if is_kl else "only a KL posterior has a variance"
    if inner.take("double_z", True) is not is_kl:
        raise inner.error("double_z", f"set it to {str(is_kl).lower()}: {reason}")
    options = inner.given("tanh_out")
    inner.only("give_pre_end", False, "a decoder without its last layers makes no picture")
    inner.close()
    regularizer = node("ldm.autoencoder.regularizers.KL") if is_kl else _quantizer(p)
    params = {"architecture": arch, "regularizer": regularizer, "embed_dim": p.take("embed_dim"), **options}
    return node("ldm.models.autoencoder.Autoencoder", **params)


def _quantizer(p: Params) -> Node:
    params = {"num_codes": p.take("n_embed"), "dim": p.peek("embed_dim"), **p.given("remap", "sane_index_shape")}
    return node("ldm.autoencoder.regularizers.VectorQuantizer", **params)


def with_weights(built: Node, p: Params) -> Node:
    """Carry `ckpt_path` and `ignore_keys` over to the node itself."""
    path, ignore = p.take("ckpt_path", None), p.take("ignore_keys", None)
    if path:
        built["checkpoint"] = _weights_path(str(path))
        if ignore:
            built["ignore_keys"] = [ignore] if isinstance(ignore, str) else list(ignore)
    return built


def _weights_path(path: str) -> str:
    """Correct the paths in three published configs, which name a YAML file that never existed."""
    prefix, suffix = "configs/first_stage_models/", "/model.yaml"
    if not (path.startswith(prefix) and path.endswith(suffix)):
        return path
    corrected = f"models/first_stage_models/{path.removeprefix(prefix).removesuffix(suffix)}/model.ckpt"
    log.info("ckpt_path: %s is a mistake of the published config; reading %s", path, corrected)
    return corrected


def first_stage(p: Params) -> Node:
    """Translate a first stage inside a latent diffusion model."""
    built = with_weights(_autoencoder(p), p)
    p.drop("lossconfig", "image_key", "colorize_nlabels", "monitor", "scheduler_config", "lr_g_factor", "use_ema")
    p.drop("batch_resize_range")
    return built


def training(p: Params) -> Node:
    """Translate an autoencoder that is to be trained."""
    autoencoder = _autoencoder(p)
    loss = p.child("lossconfig")
    params = {"model": autoencoder, "loss": loss, **p.given("image_key", "batch_resize_range>resize_range")}
    params["ema_decay"] = _EMA_DECAY if p.take("use_ema", False) else None
    params["generator_lr_factor"] = p.take("lr_g_factor", 1.0)
    if p.peek("scheduler_config") is not None:
        params["lr_schedule"] = p.child("scheduler_config")
    p.drop("scheduler_config", "colorize_nlabels", "monitor")
    return with_weights(node("ldm.training.autoencoder.AutoencoderTraining", **params), p)


def no_loss(p: Params) -> Node:
    """Translate the losses that stand for none."""
    return node("torch.nn.Identity")


def _adversarial(p: Params, width: int = 64) -> dict[str, Any]:
    """Translate what both adversarial losses have in common."""
    discriminator = {"in_channels": p.take("disc_in_channels", 3), "width": width}
    discriminator |= p.given("disc_num_layers>num_layers", "use_actnorm>actnorm")
    adversary = p.given("disc_factor>factor", "disc_weight>weight", "disc_conditional>conditional")
    adversary["loss"] = p.choose("disc_loss", "hinge", {"hinge": "hinge", "vanilla": "vanilla"})
    p.drop("pixelloss_weight")
    return {
        "disc_start": p.take("disc_start"),
        "perceptual_loss": node("ldm.networks.perceptual.LPIPS"),
        "discriminator": node("ldm.networks.discriminator.PatchDiscriminator", **discriminator),
        "adversary": node(f"{_LOSSES}.Adversary", **adversary),
        **p.given("perceptual_weight"),
    }


def kl_loss(p: Params) -> Node:
    """Translate LPIPSWithDiscriminator."""
    weights = {"logvar_init": p.take("logvar_init", 0.0), "kl_weight": p.take("kl_weight", 1.0)}
    return node(f"{_LOSSES}.KLLoss", **weights, **_adversarial(p))


def vq_loss(p: Params) -> Node:
    """Translate VQLPIPSWithDiscriminator, of either package."""
    p.only("perceptual_loss", "lpips", "it is the only perceptual loss")
    params = {"codebook_weight": p.take("codebook_weight", 1.0), **p.given("n_classes>num_codes")}
    params["pixel_loss"] = p.choose("pixel_loss", "l1", {"l1": "l1", "l2": "l2"})
    return node(f"{_LOSSES}.VQLoss", **params, **_adversarial(p, width=p.take("disc_ndf", 64)))


def discriminator(p: Params) -> Node:
    """Translate NLayerDiscriminator, whose initial values are torch's unless a loss makes it."""
    params = p.given("input_nc>in_channels", "ndf>width", "n_layers>num_layers", "use_actnorm>actnorm")
    return node("ldm.networks.discriminator.PatchDiscriminator", **params, init_std=None)


def quantizer(p: Params) -> Node:
    """Translate VectorQuantizer2."""
    params = p.given("n_e>num_codes", "e_dim>dim", "beta", "remap", "unknown_index", "sane_index_shape", "legacy")
    return node("ldm.autoencoder.regularizers.VectorQuantizer", **params)


_NOT_RELEASED = "the paper's models use VQModel or AutoencoderKL, which are"

TABLE: dict[str, Translate] = {
    **dict.fromkeys(AUTOENCODERS, training),
    **dict.fromkeys(DUMMY_LOSSES, no_loss),
    IDENTITY: renaming("ldm.models.autoencoder.IdentityAutoencoder", drop=("vq_interface",)),
    "ldm.modules.losses.LPIPSWithDiscriminator": kl_loss,
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": kl_loss,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": vq_loss,
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": vq_loss,
    "taming.modules.discriminator.model.NLayerDiscriminator": discriminator,
    "taming.modules.vqvae.quantize.VectorQuantizer2": quantizer,
    "taming.modules.losses.lpips.LPIPS": renaming("ldm.networks.perceptual.LPIPS", drop=("use_dropout",)),
    **{
        target: unavailable(_NOT_RELEASED)
        for target in (
            "taming.models.vqgan.GumbelVQ",
            "taming.models.vqgan.EMAVQ",
            "taming.models.vqgan.VQNoDiscModel",
            "taming.models.vqgan.VQSegmentationModel",
        )
    },
}
