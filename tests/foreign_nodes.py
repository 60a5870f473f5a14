"""Nodes in the CompVis dialect, small ones, for the tests of their translation."""

import pytest

from ldm import compat
from ldm.errors import ConfigError

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def unet(**params: object) -> dict:
    known = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    return {"target": UNET, "params": {**known, "attention_resolutions": [2], "channel_mult": [1, 2], **params}}


DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
NO_LOSS = {"target": "torch.nn.Identity"}


def kl(**params: object) -> dict:
    known = {"ddconfig": DDCONFIG, "embed_dim": 4, "lossconfig": NO_LOSS}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {**known, **params}}


def vq(target: str = "VQModelInterface", **params: object) -> dict:
    known = {"ddconfig": {**DDCONFIG, "double_z": False}, "embed_dim": 4, "n_embed": 16, "lossconfig": NO_LOSS}
    return {"target": f"ldm.models.autoencoder.{target}", "params": {**known, **params}}


def latent_diffusion(**params: object) -> dict:
    known = {
        "unet_config": unet(num_heads=1),
        "first_stage_config": kl(),
        "cond_stage_config": "__is_unconditional__",
        "timesteps": 10,
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**known, **params}}


def bert(**params: object) -> dict:
    known = {"n_embed": 8, "n_layer": 1, "device": "cpu"}
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {**known, **params}}


def problem(node: dict, path: str = "m") -> str:
    with pytest.raises(ConfigError) as caught:
        compat.translate_node(node, path)
    return str(caught.value)
