"""Tiny models that diffusers can express too: their configs, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from ldm import config
from ldm.models.saving import save_folder

Config = dict[str, Any]
SIDE, STEPS = 16, 100  # of images; of the process
TEXT_WIDTH = 16  # of the text models in conftest.py
_LEVELS = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "resolution": SIDE}
_UNET = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_factors": [2]}


def autoencoder(kind: str = "KL", channels: int = 4, **architecture: Any) -> Config:
    """Return the config of a first stage; a codebook has vectors of 3 channels."""
    options = {**_LEVELS, "z_channels": channels, "attention_resolutions": [SIDE // 2], **architecture}
    width, codes = (3, {"num_codes": 32, "dim": 3}) if kind == "VectorQuantizer" else (channels, {})
    parts = tiny.node("networks.encoder_decoder.Architecture", **options)
    regularizer = tiny.node(f"autoencoder.regularizers.{kind}", **codes)
    return tiny.node("models.autoencoder.Autoencoder", architecture=parts, regularizer=regularizer, embed_dim=width)


def unet(channels: int = 4, **options: Any) -> Config:
    """Return the config of a U-Net; options that are not its own are those of UNetOptions."""
    own = {key: options.pop(key) for key in ("num_heads", "num_head_channels", "context_dim", "transformer_depth",
                                             "num_classes", "vector_dim", "attention_factors", "channel_mult",
                                             "num_res_blocks", "codebook_size") if key in options}  # fmt: skip
    if not {"num_heads", "num_head_channels"} & own.keys():
        own["num_head_channels"] = 16
    inner = {"options": tiny.node("networks.unet.UNetOptions", **options)} if options else {}
    return tiny.node("networks.unet.UNet", in_channels=channels, out_channels=channels, **{**_UNET, **own}, **inner)


def model(network: Config, first_stage: Config, conditioner: Config | None = None, **options: Any) -> Config:
    """Return section `model` of a latent diffusion model."""
    process = tiny.node("diffusion.discrete.DiscreteVP.linear", num_steps=STEPS)
    section = tiny.latent_diffusion_config(network, first_stage, conditioner)["params"]["model"]
    return {**section, "params": section["params"] | {"process": process, "latent_scale": 0.7, **options}}


def unconditional(**options: Any) -> Config:
    """Return section `model` of a model of latents of a codebook."""
    return model(unet(3), autoencoder("VectorQuantizer"), **options)


def with_bert(tokenizer: Path, max_length: int = 8, **architecture: Any) -> Config:
    """Return section `model` of a model of texts with the paper's transformer."""
    inner = {"name_or_path": str(tokenizer), "max_length": max_length, "vocab_size": 64}
    texts = {"tokenizer": tiny.node("conditioning.tokenizers.HuggingFaceTokenizer", **inner), "dim": 32, "depth": 2}
    network = unet(context_dim=32, num_heads=2)
    return model(network, autoencoder(**architecture), tiny.node("conditioning.text.TextConditioner", **texts))


def with_clip(folder: Path) -> Config:
    """Return section `model` of a model of texts with CLIP's text model."""
    texts = tiny.node("conditioning.text.CLIPTextConditioner", version=str(folder), max_length=8)
    return model(unet(context_dim=16, num_heads=2), autoencoder(), texts)


def text(version: Path, **options: Any) -> Config:
    """Return the config of CLIP's text model."""
    return tiny.node("conditioning.text.CLIPTextConditioner", version=str(version), max_length=8, **options)


def sd1(clip: Path, open_clip: Path) -> Config:
    """Return section `model` of a Stable Diffusion 1."""
    return model(unet(context_dim=TEXT_WIDTH, num_heads=2), autoencoder(), text(clip))


def sd2(clip: Path, open_clip: Path) -> Config:
    """Return section `model` of a Stable Diffusion 2 that predicts v."""
    conditioner = text(open_clip, layer="penultimate", pad_id=0)
    network, prediction = (
        unet(context_dim=TEXT_WIDTH, linear_projections=True),
        tiny.node("diffusion.prediction.Velocity"),
    )
    return model(network, autoencoder(), conditioner, prediction=prediction)


def inpainting(clip: Path, open_clip: Path) -> Config:
    """Return section `model` of a Stable Diffusion 1.5 for inpainting."""
    network = unet(context_dim=TEXT_WIDTH, num_heads=2)
    network["params"]["in_channels"] = 9
    parts = {"inpainting": tiny.node("conditioning.images.InpaintingConditioner", latent_scale=0.7), "text": text(clip)}
    return model(network, autoencoder(), tiny.node("conditioning.base.JointConditioner", **parts))


def sdxl(clip: Path, open_clip: Path) -> Config:
    """Return section `model` of a Stable Diffusion XL."""
    sizes = {"original_size": {}, "crop": {"is_corner": True}, "target_size": {}}
    parts = {
        "text": text(clip, layer="hidden"),
        "text_2": text(open_clip, layer="hidden", pooled="projected", pad_id=0),
    }
    for key, more in sizes.items():
        parts[key] = tiny.node("conditioning.sizes.SizeConditioner", key=key, dim=4, **more)
    options = {"linear_projections": True, "transformer_depth": [1, 2], "vector_dim": TEXT_WIDTH + 24}
    network = unet(context_dim=2 * TEXT_WIDTH, **options)
    return model(network, autoencoder(), tiny.node("conditioning.base.StackedConditioner", **parts))


FAMILY = {"sd1": sd1, "sd2": sd2, "inpainting": inpainting, "sdxl": sdxl}


def super_resolution() -> Config:
    """Return section `model` of a model of small images."""
    network = unet(3)
    network["params"]["in_channels"] = 6
    image = tiny.node("conditioning.images.ImageConditioner", key="low_res", channels=3)
    return model(network, autoencoder("VectorQuantizer"), image, latent_scale=1.0)


def build(section: Config, seed: int = 0) -> torch.nn.Module:
    """Return the object of a config in eval mode, no layer of it zero."""
    torch.manual_seed(seed)
    built = config.instantiate(section).eval().requires_grad_(False)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    built.load_state_dict(built.state_dict())  # so that published weights do not take their place
    return built


def folder_of(section: Config, path: Path) -> tuple[Path, torch.nn.Module]:
    """Write a model of a config as a folder; return it with the model."""
    built = build(section)
    return save_folder(path, built, section), built


def edit(file: Path, change: Callable[[Config], Any]) -> None:
    """Change the mapping in a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
