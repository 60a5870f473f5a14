"""UNet2DModel (self-attention alone) and UNet2DConditionModel (cross-attention) <-> our U-Net.

The trap is `attention_head_dim`: in UNet2DModel the width of a head, the same at all levels; in UNet2DConditionModel,
whatever it is called, the number of heads, one for all levels or one each.
"""

from __future__ import annotations

from typing import Any

from ldm.bounds import Depth, Levels, Size
from ldm.compat.diffusers.rules import (
    Component,
    Rename,
    Rule,
    Values,
    chosen,
    fixed,
    multiples,
    only,
    renamed,
    same,
    uniform,
)
from ldm.errors import ConfigError

_TARGET, _OPTIONS = "ldm.networks.unet.UNet", "ldm.networks.unet.UNetOptions"
_PLAIN = ("DownBlock2D", "UpBlock2D")
_RESAMPLING = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
_SELF, _CROSS = ("AttnDownBlock2D", "AttnUpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AROUND = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


# --------------------------------------------------------------------------------------------------------------- sizes


def _read_widths(theirs: Values) -> Values:
    widths = theirs["block_out_channels"]
    return {"channel_mult": multiples(widths, "block_out_channels"), "model_channels": widths[0]}


def _widths(ours: Values) -> list[int]:
    if ours["channel_mult"][0] != 1:
        raise ConfigError("must begin with 1: their first convolution is as wide as the first level", "channel_mult")
    return [ours["model_channels"] * multiple for multiple in ours["channel_mult"]]


def _blocks(attention: tuple[str, str], middle: str, default: str, may_resample: bool = False) -> Rule:
    """Return the rule of which levels have attention, and of residual blocks that change the resolution."""

    def choose(resamples: bool) -> tuple[tuple[tuple[str, str], ...], str]:
        return ((_RESAMPLING, attention), "resnet") if resamples else ((_PLAIN, attention), "conv")

    def types(has_attention: list[bool], kinds: tuple[tuple[str, str], ...], how: str) -> Values:
        found: Values = {
            "down_block_types": [kinds[has][0] for has in has_attention],
            "up_block_types": [kinds[has][1] for has in reversed(has_attention)],
            "mid_block_type": middle,
        }
        return found | ({"downsample_type": how, "upsample_type": how} if may_resample else {})

    def read(theirs: Values) -> Values:
        if len(theirs["down_block_types"]) != len(theirs["block_out_channels"]):
            raise ConfigError("has another number of levels than block_out_channels", "down_block_types")
        has_attention = [kind == attention[0] for kind in theirs["down_block_types"]]
        resamples = may_resample and theirs["downsample_type"] == "resnet"
        kinds, how = choose(resamples)
        for name, value in types(has_attention, kinds, how).items():
            if theirs[name] != value:
                raise ConfigError(f"is not supported; with downsample_type {how} it must be {value}", name)
        factors = [2**level for level, has in enumerate(has_attention) if has]
        return {"attention_factors": factors, **({"resblock_updown": resamples} if may_resample else {})}

    def write(ours: Values) -> Values:
        return types(levels_with_attention(ours), *choose(may_resample and ours["resblock_updown"]))

    defaults = types([letter == "a" for letter in default], *choose(False))
    fields = {name: (list[str] if isinstance(value, list) else Any, value) for name, value in defaults.items()}
    return Rule(fields, ("attention_factors", *(["resblock_updown"] if may_resample else [])), read, write)


def levels_with_attention(ours: Values) -> list[bool]:
    """Return for each level whether its blocks are followed by attention."""
    return [2**level in ours["attention_factors"] for level in range(len(ours["channel_mult"]))]


# --------------------------------------------------------------------------------------------------------------- heads


def _heads_at(ours: Values, width: int) -> int:
    """Return the number of heads of an attention of this width."""
    return ours["num_heads"] or width // ours["num_head_channels"]


def _read_head_width(theirs: Values) -> Values:
    width = theirs["attention_head_dim"]
    return {"num_heads": 1} if width is None else {"num_head_channels": width}


def _write_head_width(ours: Values) -> Values:
    if ours["num_head_channels"] is not None:
        return {"attention_head_dim": ours["num_head_channels"]}
    if ours["num_heads"] == 1:
        return {"attention_head_dim": None}
    widths = _widths(ours)
    attended = {width for width, has in zip(widths, levels_with_attention(ours), strict=True) if has} | {widths[-1]}
    if len(attended) > 1:
        raise ConfigError(
            f"{ours['num_heads']} heads of different widths at different levels: UNet2DModel has one width of heads "
            "for all; only num_head_channels, or num_heads 1, can be written",
            "num_heads",
        )
    return {"attention_head_dim": attended.pop() // ours["num_heads"]}


def _read_head_number(theirs: Values) -> Values:
    given, widths = theirs["attention_head_dim"], theirs["block_out_channels"]
    numbers = [given] * len(widths) if isinstance(given, int) else list(given)
    if len(set(numbers)) == 1:
        return {"num_heads": numbers[0]}
    ratios = {width / number for width, number in zip(widths, numbers, strict=False)}
    if len(numbers) != len(widths) or len(ratios) > 1 or not ratios.copy().pop().is_integer():
        raise ConfigError(f"{given}: these numbers of heads are neither equal nor of one width", "attention_head_dim")
    return {"num_head_channels": int(ratios.pop())}


def _write_head_number(ours: Values) -> Values:
    if ours["num_heads"] is not None:
        return {"attention_head_dim": ours["num_heads"]}
    return {"attention_head_dim": [_heads_at(ours, width) for width in _widths(ours)]}


_HEADS = ("num_heads", "num_head_channels")


def _same_heads_upwards(ours: Values) -> Values:
    number = ours["num_heads_upsample"]
    if number not in (None, ours["num_heads"]) and ours["num_heads"] is not None and ours["context_dim"] is None:
        raise ConfigError(f"{number} has no counterpart: their decoder has the heads of the encoder",
                          "num_heads_upsample")  # fmt: skip
    return {}


# --------------------------------------------------------------------------------------------------------------- rules


def _shared(channels: int, widths: list[int]) -> tuple[Rule, ...]:
    return (
        same("in_channels", Size, channels),
        same("out_channels", Size, channels),
        Rule(
            {"block_out_channels": (Levels, widths)},
            ("model_channels", "channel_mult"),
            _read_widths,
            lambda ours: {"block_out_channels": _widths(ours)},
        ),
        uniform("layers_per_block", Depth, 2, "num_res_blocks"),
        same("dropout", float, 0.0),
        same("num_class_embeds", Size | None, None, "num_classes"),
        chosen("resnet_time_scale_shift", "default", "scale_shift_norm", {"default": False, "scale_shift": True}),
        Rule({}, ("num_heads_upsample",), write=_same_heads_upwards),
        fixed("norm_eps", 1e-5),
        fixed("norm_num_groups", 32),
        fixed("act_fn", "silu", "swish"),
        fixed("flip_sin_to_cos", True),
        fixed("freq_shift", 0),
        fixed("downsample_padding", 1),
        fixed("mid_block_scale_factor", 1),
        fixed("time_embedding_type", "positional"),
        only("codebook_size", None, "it predicts no codes"),
        only("conv_resample", True, "it has convolutions at changes of resolution"),
        only("dims", 2, "it is for images"),
    )


def _middle_norm(theirs: Values) -> Values:
    shifted, groups = theirs["resnet_time_scale_shift"] == "scale_shift", theirs["attn_norm_num_groups"]
    if groups != 32 and (groups is not None or shifted):
        raise ConfigError(f"{groups} is not supported; our attention in the middle has a norm of 32 groups",
                          "attn_norm_num_groups")  # fmt: skip
    return {}


_COMMON = {"target": _TARGET, "children": {"options": _OPTIONS}, "unused": ("checkpoint", "qkv_order"),
           "ignored": ("sample_size", "num_train_timesteps", "upcast_attention")}  # fmt: skip
SIZE_WIDTH = 256  # of an embedded size, in all published models


def _read_vectors(theirs: Values) -> Values:
    kind, width = theirs["addition_embed_type"], theirs["projection_class_embeddings_input_dim"]
    if kind not in (None, "text_time"):
        raise ConfigError(f"{kind!r} is not supported; only text_time", "addition_embed_type")
    if (kind is None) != (width is None):
        raise ConfigError("goes with addition_embed_type: text_time", "projection_class_embeddings_input_dim")
    return {} if width is None else {"vector_dim": width}


def _write_vectors(ours: Values) -> Values:
    width = ours["vector_dim"]
    has = width is not None
    return {
        "addition_embed_type": "text_time" if has else None,
        "addition_time_embed_dim": SIZE_WIDTH if has else None,
        "projection_class_embeddings_input_dim": width,
    }


UNET_2D = Component(
    name="UNet2DModel",
    rules=(
        *_shared(3, [224, 448, 672, 896]),
        _blocks(_SELF, "UNetMidBlock2D", "paaa", may_resample=True),
        Rule({"attention_head_dim": (Size | None, 8)}, _HEADS, _read_head_width, _write_head_width),
        fixed("add_attention", True),
        # Without this field a network with scale_shift has no norm there, unlike ours.
        Rule({"attn_norm_num_groups": (int | None, None)}, (), _middle_norm, lambda ours: {"attn_norm_num_groups": 32}),
        only("context_dim", None, "it has no cross-attention"),
        only("vector_dim", None, "it takes labels alone"),
    ),
    names=lambda ours, theirs: _names(ours, _self_attention),
    **{**_COMMON, "unused": (*_COMMON["unused"], "transformer_depth", "linear_projections")},
)

UNET_2D_CONDITION = Component(
    name="UNet2DConditionModel",
    rules=(
        *_shared(4, [320, 640, 1280, 1280]),
        _blocks(_CROSS, "UNetMidBlock2DCrossAttn", "aaap"),
        only("resblock_updown", False, "its residual blocks keep the resolution"),
        Rule({"attention_head_dim": (Size | Levels, 8)}, _HEADS, _read_head_number, _write_head_number),
        uniform("cross_attention_dim", Size, 1280, "context_dim"),
        same("transformer_layers_per_block", Depth | list[Depth], 1, "transformer_depth"),
        same("use_linear_projection", bool, False, "linear_projections"),
        Rule(
            {
                "addition_embed_type": (str | None, None),
                "addition_time_embed_dim": (Size | None, None),
                "projection_class_embeddings_input_dim": (Size | None, None),
            },
            ("vector_dim",),
            _read_vectors,
            _write_vectors,
        ),
        fixed("resnet_out_scale_factor", 1.0),
        fixed("conv_in_kernel", 3),
        fixed("conv_out_kernel", 3),
        fixed("attention_type", "default"),
    ),
    names=lambda ours, theirs: _names(ours, _transformer),
    **{**_COMMON, "ignored": (*_COMMON["ignored"], "addition_embed_type_num_heads")},
)


# --------------------------------------------------------------------------------------------------------------- names


def _self_attention(ours: str, theirs: str, parameters: Values, width: int) -> list[Rename]:
    groups = _heads_at(parameters, width) if parameters["qkv_order"] == "legacy" else 1
    return [
        Rename(f"{ours}.norm", (f"{theirs}.group_norm",)),
        Rename(f"{ours}.qkv", tuple(f"{theirs}.to_{letter}" for letter in "qkv"), axes=1, groups=groups),
        Rename(f"{ours}.proj_out", (f"{theirs}.to_out.0",), axes=1),
    ]


def _transformer(ours: str, theirs: str, parameters: Values, width: int) -> list[Rename]:
    return [Rename(ours, (theirs,))]


def _names(ours: Values, attention: Any) -> list[Rename]:
    """Count through the blocks: `num_res_blocks` a level and its change of size on the way down, one more each up."""
    widths, has_attention = _widths(ours), levels_with_attention(ours)
    count, levels = ours["num_res_blocks"], len(widths)
    names = [Rename(old, (new,)) for old, new in _AROUND.items()]
    names += renamed("middle_block.0", "mid_block.resnets.0", _RESIDUAL)
    names += attention("middle_block.1", "mid_block.attentions.0", ours, widths[-1])
    names += renamed("middle_block.2", "mid_block.resnets.1", _RESIDUAL)
    for level, width in enumerate(widths):
        upward = levels - 1 - level
        sides = ((f"down_blocks.{level}", "input_blocks", 1 + level * (count + 1), count),
                 (f"up_blocks.{upward}", "output_blocks", upward * (count + 1), count + 1))  # fmt: skip
        for theirs, blocks, first, number in sides:
            for j in range(number):
                names += renamed(f"{blocks}.{first + j}.0", f"{theirs}.resnets.{j}", _RESIDUAL)
                if has_attention[level]:
                    names += attention(f"{blocks}.{first + j}.1", f"{theirs}.attentions.{j}", ours, width)
        down, up = (level + 1) * (count + 1), upward * (count + 1) + count
        last = 1 + has_attention[level]  # behind the attention, if there is any
        for old, new, inner in (
            (f"input_blocks.{down}.0", f"down_blocks.{level}.downsamplers.0", "op"),
            (f"output_blocks.{up}.{last}", f"up_blocks.{upward}.upsamplers.0", "conv"),
        ):
            names += renamed(old, new, _RESIDUAL if ours["resblock_updown"] else {inner: "conv"})
    return names
