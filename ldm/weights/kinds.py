"""What people give instead of the weights of a model, by its first bytes or by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a state dict is that has a name which begins as `pattern`, and what to do with it."""

    pattern: str
    name: str
    remedy: str


_FOLDER = "give the folder that it lay in, with its config.json"
_OF_ITS_NETWORK = "use it with a config of its network, as configs/ldm/dit_xl.yaml or sit_xl.yaml"
_BASE = "give the weights of its base, and this file by --adapter"
# The first that matches: a file for a part of a model also has names of the model.
KINDS = (
    Kind(r"lora_(unet|te)|.*\.(lora_(A|B|up|down)|hada_w1|lokr_w1)\b", "an adapter (LoRA)", _BASE),
    Kind(r"control_model\.|controlnet_", "a ControlNet", "it is not supported"),
    Kind(r"down_blocks\.", "a diffusers file (U-Net)", _FOLDER),
    Kind(r"encoder\.down_blocks\.", "a diffusers file (autoencoder)", _FOLDER),
    Kind(r"transformer_blocks\.", "a diffusers file (transformer)", "only its U-Nets and autoencoders are read"),
    Kind(r"text_model\.", "a CLIP text model of transformers", "name its folder as the conditioner's version"),
    Kind(r"conditioner\.embedders\.1\.model\.", "Stable Diffusion XL", "use it with configs/stability/sdxl_base.yaml"),
    Kind(r"conditioner\.embedders\.", "a checkpoint of sgm (Stable Diffusion XL, ...)", "use it with its own config"),
    Kind(r"cond_stage_model\.model\.", "Stable Diffusion 2", "use it with configs/stability/sd2.yaml or sd2_v.yaml"),
    Kind(r"visual\.|transformer\.resblocks\.", "an OpenCLIP model", "it is no diffusion model"),
    Kind(r"(model\.diffusion_model\.)?(x_embedder\.|blocks\.\d+\.adaLN)", "a DiT or SiT", _OF_ITS_NETWORK),
    Kind(r"features\.\d+\.|layer1\.\d", "a torchvision network", "it is no diffusion model"),
    Kind(r"module\.", "the state of a module in DataParallel", "save it again without the prefix module."),
    Kind(r"model\.diffusion_model\.", "a latent diffusion model", "use it with its own config"),
    Kind(r"(en|de)coder\.conv_in\.", "an autoencoder", "name it as model.params.autoencoder.checkpoint"),
)


# How files begin that people have where weights should be.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    **dict.fromkeys([b"<!DOCTYPE", b"<!doctype", b"<html"], "a web page; download the file again"),
    b"GGUF": "a GGUF file; only safetensors and files of torch.save are read",
    b"\x89HDF": "an HDF5 file (Keras); only safetensors and files of torch.save are read",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x80": "a plain pickle, not written by torch.save",
}


def format_of(start: bytes) -> str:
    """Say what a file is that begins so and is no checkpoint, and what to do."""
    known = next((name for beginning, name in _BEGINNINGS.items() if start.startswith(beginning)), None)
    return f"is {known}" if known else "is neither safetensors nor written by torch.save"


def kind_of(names: Iterable[str]) -> Kind | None:
    """Recognise whose names these are; None if nobody's that we know."""
    names = list(names)
    return next((kind for kind in KINDS if any(re.match(kind.pattern, name) for name in names)), None)
