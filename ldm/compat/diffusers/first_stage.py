"""AutoencoderKL and VQModel <-> our autoencoder.

The trap is `scaling_factor`, by which pipelines divide latents: without it diffusers takes 0.18215, also for a VQModel,
whose latents the published models do not scale. It is written always, and belongs to the diffusion model here.
"""

from __future__ import annotations

from typing import Any

from ldm.bounds import Depth, Levels, Size
from ldm.compat.diffusers.rules import Component, Rename, Rule, Values, fixed, multiples, only, renamed, same
from ldm.errors import ConfigError

DEFAULT_SCALE = 0.18215
_PLAIN = ("DownEncoderBlock2D", "UpDecoderBlock2D")
_ATTENDED = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
_ARCHITECTURE = "ldm.networks.encoder_decoder.Architecture"
_SHORTCUT = {"nin_shortcut": "conv_shortcut"}


def _types(has_attention: list[bool]) -> Values:
    kinds = (_PLAIN, _ATTENDED)
    return {
        "down_block_types": [kinds[has][0] for has in has_attention],
        "up_block_types": [kinds[has][1] for has in reversed(has_attention)],
    }


def _read_levels(theirs: Values) -> Values:
    widths = theirs["block_out_channels"]
    has_attention = [kind == _ATTENDED[0] for kind in theirs["down_block_types"]]
    for name, value in _types(has_attention).items():
        if list(theirs[name]) != value or len(value) != len(widths):
            known = " and ".join(f"{plain} or {attended}" for plain, attended in zip(_PLAIN, _ATTENDED, strict=True))
            raise ConfigError(f"{theirs[name]}: encoder and decoder must mirror each other, of {known}", name)
    side, middle = theirs["sample_size"], theirs["mid_block_add_attention"]
    if any(has_attention) and not middle:
        raise ConfigError("false is not supported where levels have attention", "mid_block_add_attention")
    return {
        "channel_mult": multiples(widths, "block_out_channels"),
        "channels": widths[0],
        "resolution": side,
        "attention_resolutions": [side // 2**level for level, has in enumerate(has_attention) if has],
        "attention": "vanilla" if middle else "none",
    }


def _has_attention(ours: Values) -> list[bool]:
    sides = [ours["resolution"] // 2**level for level in range(len(ours["channel_mult"]))]
    return [ours["attention"] != "none" and side in ours["attention_resolutions"] for side in sides]


def _write_levels(ours: Values) -> Values:
    if ours["attention"] == "linear":
        raise ConfigError("'linear' has no counterpart: their attention is vanilla", "attention")
    if ours["channel_mult"][0] != 1:
        raise ConfigError("must begin with 1: their first convolution is as wide as the first level", "channel_mult")
    return {
        "block_out_channels": [ours["channels"] * multiple for multiple in ours["channel_mult"]],
        "sample_size": ours["resolution"],
        "mid_block_add_attention": ours["attention"] == "vanilla",
        **_types(_has_attention(ours)),
    }


_SHARED = (
    same("in_channels", Size, 3),
    same("out_channels", Size, 3),
    same("layers_per_block", Depth, 1, "num_res_blocks"),
    same("norm_num_groups", Size, 32, "norm_groups"),
    Rule(
        {
            "block_out_channels": (Levels, [64]),
            "down_block_types": (list[str], [_PLAIN[0]]),
            "up_block_types": (list[str], [_PLAIN[1]]),
            "sample_size": (Size, 32),
            "mid_block_add_attention": (bool, True),
        },
        ("channels", "channel_mult", "resolution", "attention_resolutions", "attention"),
        _read_levels,
        _write_levels,
    ),
    fixed("act_fn", "silu", "swish"),
    only("dropout", 0.0, "it has no dropout"),
    only("resample_with_conv", True, "it has convolutions at changes of resolution"),
    only("tanh_out", False, "its decoder ends without tanh"),
)


def _read_kl(theirs: Values) -> Values:
    return {"z_channels": theirs["latent_channels"], "embed_dim": theirs["latent_channels"]}


def _write_kl(ours: Values) -> Values:
    if ours["embed_dim"] != ours["z_channels"]:
        problem = f"{ours['embed_dim']} is not z_channels, {ours['z_channels']}; AutoencoderKL has one number for both"
        raise ConfigError(problem, "embed_dim")
    return {"latent_channels": ours["embed_dim"]}


def _read_vq(theirs: Values) -> Values:
    width = theirs["vq_embed_dim"] or theirs["latent_channels"]
    return {"z_channels": theirs["latent_channels"], "embed_dim": width, "dim": width}


def _write_vq(ours: Values) -> Values:
    return {"latent_channels": ours["z_channels"], "vq_embed_dim": ours["embed_dim"]}


def _names(ours: Values, theirs: Values) -> list[Rename]:
    names = [Rename(name, (name,)) for name in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")]
    levels = len(ours["channel_mult"])
    for side, path, count, resample in (
        ("encoder", "down", ours["num_res_blocks"], "downsample"),
        ("decoder", "up", ours["num_res_blocks"] + 1, "upsample"),
    ):
        names.append(Rename(f"{side}.norm_out", (f"{side}.conv_norm_out",)))
        names += renamed(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _SHORTCUT)
        names += _attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        names += renamed(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _SHORTCUT)
        for level in range(levels):
            block = f"{side}.{path}_blocks.{level if path == 'down' else levels - 1 - level}"
            for j in range(count):
                names += renamed(f"{side}.{path}.{level}.block.{j}", f"{block}.resnets.{j}", _SHORTCUT)
                names += _attention(f"{side}.{path}.{level}.attn.{j}", f"{block}.attentions.{j}")
            names.append(Rename(f"{side}.{path}.{level}.{resample}", (f"{block}.{resample}rs.0",)))
    return names


def _attention(ours: str, theirs: str) -> list[Rename]:
    pairs = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
    linear = [Rename(f"{ours}.{old}", (f"{theirs}.{new}",), axes=2) for old, new in pairs]
    return [Rename(f"{ours}.norm", (f"{theirs}.group_norm",)), *linear]


def _autoencoder(name: str, regularizer: str, rules: tuple[Rule, ...], **options: Any) -> Component:
    children = {"architecture": _ARCHITECTURE, "regularizer": f"ldm.autoencoder.regularizers.{regularizer}"}
    target = "ldm.models.autoencoder.Autoencoder"
    ignored = ("scaling_factor", "force_upcast")
    return Component(name, target, (*_SHARED, *rules), _names, children, ignored=ignored, **options)


AUTOENCODER_KL = _autoencoder(
    "AutoencoderKL",
    "KL",
    (
        Rule({"latent_channels": (Size, 4)}, ("z_channels", "embed_dim"), _read_kl, _write_kl),
        fixed("use_quant_conv", True),
        fixed("use_post_quant_conv", True),
    ),
)
VQ_MODEL = _autoencoder(
    "VQModel",
    "VectorQuantizer",
    (
        Rule(
            {"latent_channels": (Size, 3), "vq_embed_dim": (Size | None, None)},
            ("z_channels", "embed_dim", "dim"),
            _read_vq,
            _write_vq,
        ),
        same("num_vq_embeddings", Size, 256, "num_codes"),
        fixed("norm_type", "group"),
        only("remap", None, "its codes are all in use"),
        only("beta", 0.25, "it is fixed"),
        only("legacy", True, "the weights of its losses are the published ones"),
    ),
    unused=("unknown_index", "sane_index_shape"),
)
