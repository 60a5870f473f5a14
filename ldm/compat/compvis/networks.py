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
        "use_checkpoint>checkpoint", "use_linear_in_transformer>linear_projections",
    )  # fmt: skip
    if p.take("use_new_attention_order", False):
        options["qkv_order"] = "new"
    p.drop("use_fp16", "use_bf16")  # read as the precision of the training, see `translate`
    p.off("disable_self_attentions", "disable_middle_self_attn", "offload_to_cpu")
    p.choose("spatial_transformer_attn_type", "softmax", dict.fromkeys(("softmax", "softmax-xformers")))
    return options


def _with_options(params: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return params | ({"options": node("ldm.networks.unet.UNetOptions", **options)} if options else {})


def _vectors(p: Params) -> dict[str, Any]:
    """Translate what is added to the embedded time: labels, or vectors ("sequential")."""
    classes, width = p.take("num_classes", None), p.take("adm_in_channels", None)
    if classes == "sequential":
        if width is None:
            raise p.error("adm_in_channels", "missing; num_classes: sequential needs it")
        return {"vector_dim": width}
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
        raise p.error("num_classes", f"{classes!r} is not supported; only a number, sequential or null")
    return {} if classes is None else {"num_classes": classes}


def precision(model: Any) -> str | None:
    """Return the precision of a training of a model, where its U-Net says that it computes in half; None elsewhere."""
    params = model.get("params") if isinstance(model, dict) else None
    unet_config = params.get("unet_config") if isinstance(params, dict) else None
    given = unet_config.get("params") if isinstance(unet_config, dict) else None
    names = {"use_fp16": "16-mixed", "use_bf16": "bf16-mixed"}
    return next((names[name] for name in names if isinstance(given, dict) and given.get(name)), None)


def _same_attention_blocks(p: Params, params: dict[str, Any]) -> None:
    """Accept numbers of attention blocks that are those of the residual blocks, and the depth of the last level."""
    given = p.take("num_attention_blocks", None)
    if given is not None and any(number != params["num_res_blocks"] for number in given):
        raise p.error("num_attention_blocks", f"{given} is not supported; only num_res_blocks at every level")
    depth = params.get("transformer_depth", 1)
    last = depth[-1] if isinstance(depth, list) and depth else depth
    p.only("transformer_depth_middle", last, f"in the middle it is that of the last level, {last}", None)


def unet(p: Params, uses_transformers: bool | None = None) -> Node:
    """Translate UNetModel, by the rule for heads that the last commit of the original has.

    uses_transformers: whether it does where it does not say.
    """
    heads_given = "num_heads" in p
    p.uniform("num_res_blocks")
    p.require("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
    params = p.given(
        "in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions>attention_factors",
        "channel_mult", "transformer_depth", "n_embed>codebook_size",
    )  # fmt: skip
    params |= _vectors(p) | _heads(p)
    options = _options(p)
    _same_attention_blocks(p, params)
    context_dim = p.take("context_dim", None)
    context_dim = context_dim[0] if isinstance(context_dim, list) and len(context_dim) == 1 else context_dim
    transformer = p.take("use_spatial_transformer", uses_transformers or False)
    if transformer != (context_dim is not None):
        raise p.error("context_dim", "goes with use_spatial_transformer: set both or neither")
    if transformer:
        params["context_dim"] = context_dim
        # Those weights are older than the option, and than widths of 64.
        is_old = "linear_projections" not in options and "legacy" not in p and uses_transformers is None
        if "num_head_channels" in params and not heads_given and is_old:
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
