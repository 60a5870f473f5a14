"""CompVis `ldm.modules.diffusionmodules.model` -> ours: encoder, decoder, their blocks and seldom-used relatives."""

from ldm.compat.compvis.params import Node, Params, Translate, node, renaming, unavailable

_MODEL = "ldm.modules.diffusionmodules.model"
_ENCODER_DECODER = "ldm.networks.encoder_decoder"
_EXTRAS = "ldm.networks.compvis_extras"
_ALWAYS = ("ch", "num_res_blocks", "attn_resolutions", "resolution")
_ATTENTION = {"vanilla": "vanilla", "vanilla-xformers": "vanilla", "linear": "linear", "none": "none"}
ALL_OF_A_PAIR = (*_ALWAYS, "out_ch", "in_channels", "z_channels")


def architecture(p: Params, *required: str) -> Node:
    """Translate the parameters that encoder and decoder share, into a node for Architecture."""
    p.require(*required)
    params = p.given(
        "in_channels", "out_ch>out_channels", "ch>channels", "num_res_blocks", "z_channels", "resolution",
        "attn_resolutions>attention_resolutions", "dropout", "resamp_with_conv>resample_with_conv",
    )  # fmt: skip
    params["channel_mult"] = p.take("ch_mult", [1, 2, 4, 8])
    kind = p.choose("attn_type", "vanilla", _ATTENTION)
    params["attention"] = "linear" if p.take("use_linear_attn", False) else kind
    return node(f"{_ENCODER_DECODER}.Architecture", **params)


def encoder(p: Params) -> Node:
    """Translate Encoder, which ignores what only the decoder has."""
    arch, double_z = architecture(p, *ALL_OF_A_PAIR), p.take("double_z", True)
    p.drop("give_pre_end", "tanh_out")
    return node(f"{_ENCODER_DECODER}.Encoder", arch=arch, double_z=double_z)


def decoder(p: Params) -> Node:
    """Translate Decoder, which ignores what only the encoder has."""
    arch, ends = architecture(p, *ALL_OF_A_PAIR), p.given("give_pre_end", "tanh_out")
    p.drop("double_z")
    return node(f"{_ENCODER_DECODER}.Decoder", arch=arch, **ends)


def diffusion_model(p: Params) -> Node:
    """Translate Model, the U-Net of DDPM."""
    arch = architecture(p, *_ALWAYS, "out_ch", "in_channels")
    return node(f"{_EXTRAS}.DiffusionModel", arch=arch, **p.given("use_timestep"))


def rescaling_encoder(p: Params) -> Node:
    """Translate MergedRescaleEncoder, whose out_ch is the width of its latents."""
    out_channels = p.take("out_ch")
    arch = architecture(p, *_ALWAYS, "in_channels")
    rescaling = p.given("rescale_factor", "rescale_module_depth")
    return node(f"{_EXTRAS}.MergedRescaleEncoder", arch=arch, out_channels=out_channels, **rescaling)


def rescaling_decoder(p: Params) -> Node:
    """Translate MergedRescaleDecoder."""
    arch = architecture(p, *_ALWAYS, "z_channels", "out_ch")
    return node(f"{_EXTRAS}.MergedRescaleDecoder", arch=arch, **p.given("rescale_factor", "rescale_module_depth"))


def resnet_block(p: Params) -> Node:
    """Translate ResnetBlock, which expects a time embedding unless told otherwise."""
    params = p.given("in_channels", "out_channels", "dropout", "conv_shortcut")
    return node(f"{_ENCODER_DECODER}.ResnetBlock", temb_channels=p.take("temb_channels", 512), **params)


TABLE: dict[str, Translate] = {
    f"{_MODEL}.Encoder": encoder,
    f"{_MODEL}.Decoder": decoder,
    f"{_MODEL}.Model": diffusion_model,
    f"{_MODEL}.MergedRescaleEncoder": rescaling_encoder,
    f"{_MODEL}.MergedRescaleDecoder": rescaling_decoder,
    f"{_MODEL}.ResnetBlock": resnet_block,
    f"{_MODEL}.AttnBlock": renaming("ldm.networks.attention.SpatialSelfAttention", "in_channels"),
    f"{_MODEL}.LinAttnBlock": renaming(f"{_ENCODER_DECODER}.LinAttnBlock", "in_channels"),
    f"{_MODEL}.Downsample": renaming(f"{_ENCODER_DECODER}.Downsample", "in_channels>channels", "with_conv"),
    f"{_MODEL}.Upsample": renaming(f"{_ENCODER_DECODER}.Upsample", "in_channels>channels", "with_conv"),
    f"{_MODEL}.SimpleDecoder": renaming(f"{_EXTRAS}.SimpleDecoder", "in_channels", "out_channels"),
    f"{_MODEL}.UpsampleDecoder": renaming(
        f"{_EXTRAS}.UpsampleDecoder", "in_channels", "out_channels", "ch>channels", "num_res_blocks",
        "ch_mult>channel_mult", "dropout", drop=("resolution",),
    ),
    f"{_MODEL}.LatentRescaler": renaming(
        f"{_EXTRAS}.LatentRescaler", "factor", "in_channels", "mid_channels", "out_channels", "depth"
    ),
    f"{_MODEL}.Upsampler": unavailable("no released config uses it"),
    f"{_MODEL}.FirstStagePostProcessor": unavailable("it never ran; the original does not import what it uses"),
    f"{_MODEL}.Resize": unavailable("no released config uses it"),
}  # fmt: skip
