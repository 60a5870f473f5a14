"""CompVis networks -> ours: the U-Net, the noisy-latent classifier's encoder, and the blocks that they are made of."""

import logging
from typing import Any

from ldm.compat.compvis.params import Node, Params, Translate, node, renaming
from ldm.errors import ConfigError

log = logging.getLogger(__name__)

_OPENAI = "ldm.modules.diffusionmodules.openaimodel"
_ATTENTION = "ldm.modules.attention"
_UNSET = (-1, None)


def _heads(p: Params, default: int = -1) -> dict[str, int]:
    """Translate the head counts, where -1 means unset and a given width wins over a given number."""
    number, width = p.take("num_heads", default), p.take("num_head_channels", -1)
    if width not in _UNSET:
        return {"num_head_channels": width}
    if number in _UNSET:
        raise ConfigError(f"set num_heads or num_head_channels; {p.target} needs one of them", p.path)
    return {"num_heads": number}


def _options(p: Params) -> dict[str, Any]:
    """Translate the seldom-used options, those that are given."""
    options = p.given(
        "dropout", "conv_resample", "use_scale_shift_norm>scale_shift_norm", "resblock_updown", "dims",
        "use_checkpoint>checkpoint",
    )  # fmt: skip
    if p.take("use_new_attention_order", False):
        options["qkv_order"] = "new"
    p.only("use_linear_in_transformer", False, "transformers project by convolutions here")
    p.only("use_fp16", False, "choose the precision of the training instead (--precision)")
    return options


def _with_options(params: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return params | ({"options": node("ldm.networks.unet.UNetOptions", **options)} if options else {})


def unet(p: Params) -> Node:
    """Translate UNetModel, by the rule for heads that the last commit of the original has."""
    heads_given = "num_heads" in p
    p.require("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
    params = p.given(
        "in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions>attention_factors",
        "channel_mult", "transformer_depth", "num_classes", "n_embed>codebook_size",
    )  # fmt: skip
    params |= _heads(p)
    options = _options(p)
    transformer, context_dim = p.take("use_spatial_transformer", False), p.take("context_dim", None)
    if transformer != (context_dim is not None):
        raise p.error("context_dim", "goes with use_spatial_transformer: set both or neither")
    if transformer:
        params["context_dim"] = context_dim
        if "num_head_channels" in params and not heads_given:
            _warn_about_heads(p, params["num_head_channels"])
    upsample_heads, legacy = p.take("num_heads_upsample", -1), p.take("legacy", True)
    if upsample_heads not in _UNSET and legacy and not transformer and "num_heads" in params:
        options["num_heads_upsample"] = upsample_heads
    p.drop("image_size")
    return node("ldm.networks.unet.UNet", **_with_options(params, options))


def _warn_about_heads(p: Params, width: int) -> None:
    log.warning(
        "%s: num_head_channels=%s makes transformers with C/%s heads. The weights released in December 2021 (cin256, "
        "layout2img-openimages256, text2img256) were trained with one head, and fit silently; for those set "
        "num_heads=1 num_head_channels=-1.",
        p.node_path or "unet_config", width, width,
    )  # fmt: skip


def encoder_unet(p: Params) -> Node:
    """Translate EncoderUNetModel, which ignores every parameter that it does not know."""
    p.require("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
    params = p.given(
        "image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks",
        "attention_resolutions>attention_factors", "channel_mult", "pool",
    )  # fmt: skip
    params |= _heads(p, default=1)
    options = _options(p)
    p.drop("num_heads_upsample", "use_spatial_transformer", "transformer_depth", "context_dim", "num_classes")
    p.drop("n_embed", "legacy")
    return node("ldm.networks.compvis_extras.EncoderUNet", **_with_options(params, options))


def attention_block(p: Params) -> Node:
    """Translate AttentionBlock."""
    params = p.given("channels", "num_heads", "use_checkpoint>checkpoint")
    width = p.take("num_head_channels", -1)
    if width not in _UNSET:
        params["num_head_channels"] = width
    if p.take("use_new_attention_order", False):
        params["qkv_order"] = "new"
    return node("ldm.networks.attention.AttentionBlock", **params)


TABLE: dict[str, Translate] = {
    f"{_OPENAI}.UNetModel": unet,
    f"{_OPENAI}.EncoderUNetModel": encoder_unet,
    f"{_OPENAI}.AttentionBlock": attention_block,
    f"{_OPENAI}.ResBlock": renaming(
        "ldm.networks.residual.ResBlock", "channels", "emb_channels", "dropout", "out_channels", "use_conv",
        "use_scale_shift_norm", "dims", "use_checkpoint>checkpoint", "up", "down",
    ),
    f"{_OPENAI}.Downsample": renaming(
        "ldm.networks.residual.Downsample", "channels", "use_conv", "dims", "out_channels", drop=("padding",)
    ),
    f"{_OPENAI}.Upsample": renaming(
        "ldm.networks.residual.Upsample", "channels", "use_conv", "dims", "out_channels", drop=("padding",)
    ),
    f"{_OPENAI}.AttentionPool2d": renaming(
        "ldm.networks.attention.AttentionPool2d", "spacial_dim>spatial_size", "embed_dim",
        "num_heads_channels>num_head_channels", "output_dim",
    ),
    f"{_ATTENTION}.SpatialTransformer": renaming(
        "ldm.networks.attention.SpatialTransformer", "in_channels", "n_heads>num_heads", "d_head>head_channels",
        "depth", "dropout", "context_dim",
    ),
    f"{_ATTENTION}.BasicTransformerBlock": renaming(
        "ldm.networks.attention.BasicTransformerBlock", "dim", "n_heads>num_heads", "d_head>head_channels", "dropout",
        "context_dim", "gated_ff", "checkpoint",
    ),
    f"{_ATTENTION}.CrossAttention": renaming(
        "ldm.networks.attention.CrossAttention", "query_dim", "context_dim", "heads>num_heads",
        "dim_head>head_channels", "dropout",
    ),
    f"{_ATTENTION}.GEGLU": renaming("ldm.networks.attention.GEGLU", "dim_in", "dim_out"),
    f"{_ATTENTION}.FeedForward": renaming(
        "ldm.networks.attention.FeedForward", "dim", "dim_out", "mult", "glu", "dropout"
    ),
    f"{_ATTENTION}.LinearAttention": renaming(
        "ldm.networks.attention.LinearAttention", "dim", "heads", "dim_head>head_channels"
    ),
    f"{_ATTENTION}.SpatialSelfAttention": renaming("ldm.networks.attention.SpatialSelfAttention", "in_channels"),
}  # fmt: skip
