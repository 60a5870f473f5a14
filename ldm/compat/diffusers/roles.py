"""The folders of each pipeline, what each is to our model, and the conditioners that several of them make up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm.compat.diffusers.first_stage import AUTOENCODER_KL, VQ_MODEL
from ldm.compat.diffusers.rules import Component, Node, Values
from ldm.compat.diffusers.text import CLIP_HIDDEN, CLIP_PROJECTED, CLIP_TEXT, LDM_BERT
from ldm.compat.diffusers.unet import SIZE_WIDTH, UNET_2D, UNET_2D_CONDITION
from ldm.config.nodes import is_node
from ldm.errors import ConfigError


@dataclass(frozen=True, eq=False)  # a key of mappings
class Role:
    """What a folder of a pipeline is to our model: its parameter, the beginning of its weights' names, its classes."""

    parameter: str
    prefix: str
    kinds: tuple[Component, ...]


UNET = Role("network", "model.diffusion_model.", (UNET_2D, UNET_2D_CONDITION))
VAE = Role("autoencoder", "first_stage_model.", (AUTOENCODER_KL, VQ_MODEL))
TEXT = Role("conditioner", "cond_stage_model.", (CLIP_TEXT, LDM_BERT))
TEXT_1 = Role("text", "cond_stage_model.text.", (CLIP_HIDDEN,))
TEXT_OF_INPAINTING = Role("text", "cond_stage_model.text.", (CLIP_TEXT,))
TEXT_2 = Role("text_2", "cond_stage_model.text_2.", (CLIP_PROJECTED,))
STABLE, XL, SUPER_RESOLUTION = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LDMSuperResolutionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"
# The folders of each pipeline; those without a role are read in their own way.
PIPELINES = {
    "LDMPipeline": {"unet": UNET, "vqvae": VAE},
    "LDMTextToImagePipeline": {"unet": UNET, "vqvae": VAE, "bert": TEXT},
    SUPER_RESOLUTION: {"unet": UNET, "vqvae": VAE},
    STABLE: {"unet": UNET, "vae": VAE, "text_encoder": TEXT},
    INPAINTING: {"unet": UNET, "vae": VAE, "text_encoder": TEXT_OF_INPAINTING},
    XL: {"unet": UNET, "vae": VAE, "text_encoder": TEXT_1, "text_encoder_2": TEXT_2},
}
TEXTS = (CLIP_TEXT, CLIP_HIDDEN, CLIP_PROJECTED, LDM_BERT)
# Where diffusers finds a class, if not in itself.
LIBRARIES = {**dict.fromkeys(TEXTS, "transformers"), LDM_BERT: "latent_diffusion"}
NO_PART_OF_THE_MODEL = ("safety_checker", "feature_extractor", "requires_safety_checker", "add_watermarker")
_CONDITIONING = "ldm.conditioning."
_MASK, _SIZE, _CLIP = "images.InpaintingConditioner", "sizes.SizeConditioner", "text.CLIPTextConditioner"
_SIZES = ("original_size", "crop", "target_size")  # in their order in the vector of XL


class Described(NamedTuple):
    """What a conditioner of ours is there.

    Args:
        pipeline: None where that also depends on the first stage.
        texts: Its text encoders, with their places in our config.
        index: Fields of model_index.json.
        network: Fields of the U-Net.
    """

    pipeline: str | None
    texts: dict[Role, tuple[Node, str]] = {}
    index: Values = {}
    network: Values = {}


def conditioner(pipeline: str, params: Values, content: Values, network: Values) -> Values:
    """Return the conditioner of a pipeline that has more to it than one text encoder.

    params: what was read of the pipeline; content: of model_index.json; network: the fields of the U-Net.
    """
    if pipeline == SUPER_RESOLUTION:
        channels = params["network"]["params"]["in_channels"]
        image = _node("images.ImageConditioner", key="low_res", channels=channels // 2)  # as the pipeline splits them
        return {"conditioner": image}
    if pipeline == INPAINTING:
        concat = _node(_MASK, latent_scale=params["latent_scale"])
        return {"conditioner": _node("base.JointConditioner", inpainting=concat, text=params["text"])}
    if pipeline != XL:
        return {}
    zeros = content.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise ConfigError(f"{zeros!r} is neither true nor false", "force_zeros_for_empty_prompt")
    parts, dim = (
        {"text": params["text"], "text_2": params["text_2"]},
        network.get("addition_time_embed_dim", SIZE_WIDTH),
    )
    for key in _SIZES:
        corner = {"is_corner": True} if key == "crop" else {}
        parts[key] = _node(_SIZE, key=key, dim=dim, **corner)
    return {"conditioner": _node("base.StackedConditioner", null="zeros" if zeros else "own", **parts)}


def _node(target: str, **params: Any) -> Node:
    return {"target": f"{_CONDITIONING}{target}", "params": params}


def described(params: Values) -> Described:
    """Return what the conditioner in the parameters of our model is there. ConfigError for one that no pipeline has."""
    conditioner = params.get("conditioner")
    if conditioner is None:
        return Described("LDMPipeline")
    target, inner = conditioner["target"].removeprefix(_CONDITIONING), conditioner.get("params") or {}
    place = "model.params.conditioner"
    if target == "images.ImageConditioner":
        channels = params["network"]["params"]["in_channels"]
        if inner.get("channels", 3) * 2 != channels:
            problem = f"diffusers: half of the {channels} channels are the image's in a {SUPER_RESOLUTION}"
            raise ConfigError(problem, f"{place}.params.channels")
        return Described(SUPER_RESOLUTION)
    parts = {key: part for key, part in inner.items() if is_node(part)}
    names = [part["target"].removeprefix(_CONDITIONING) for part in parts.values()]
    texts = [key for key, name in zip(parts, names, strict=True) if name == _CLIP]
    nodes = [(parts[key], f"conditioner.params.{key}") for key in texts]
    if target == "base.JointConditioner" and sorted(names) == [_MASK, _CLIP]:
        return Described(INPAINTING, {TEXT_OF_INPAINTING: nodes[0]})
    if target == "base.StackedConditioner":
        sizes = [part.get("params") or {} for part, name in zip(parts.values(), names, strict=True) if name == _SIZE]
        corners, dims = ([size.get(*field) for size in sizes] for field in (("is_corner", False), ("dim", SIZE_WIDTH)))
        if names != [_CLIP] * 2 + [_SIZE] * 3 or corners != [False, True, False] or len({*dims}) > 1:
            problem = f"diffusers: {XL} has two CLIPTextConditioner, then {', '.join(_SIZES)} of one dim"
            raise ConfigError(problem, place)
        zeros = {"force_zeros_for_empty_prompt": inner.get("null", "zeros") == "zeros"}
        return Described(
            XL, dict(zip((TEXT_1, TEXT_2), nodes, strict=True)), zeros, {"addition_time_embed_dim": dims[0]}
        )
    return Described(None, {TEXT: (conditioner, "conditioner")})
