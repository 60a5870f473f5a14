"""The networks that peers.py measures: ours, those of diffusers, and those of a checkout of CompVis.

The same architecture on all sides; what wraps them makes their outputs tensors, a walk of samples, or the obvious
formulation.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.regularizers import KL
from ldm.conditioning.text import EmbeddingConditioner
from ldm.diffusion.discrete import DiscreteVP
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.generate import Request, generate
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.layers import store_in_half
from ldm.networks.unet import UNet
from ldm.sampling.ddim import DDIM

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class UNetSize:
    """A U-Net: channels and side of the latents, widths, factors with attention, width of heads or their number."""

    channels: int
    side: int
    width: int
    mult: tuple[int, ...]
    attention: tuple[int, ...]
    heads: int | None = None
    head_width: int | None = None
    context: tuple[int, int] | None = None  # tokens and their width

    def inputs(self, batch: int) -> Inputs:
        """Return x, t and the context, if there is one."""
        x, t = torch.randn(batch, self.channels, self.side, self.side), torch.full((batch,), 500)
        return (x, t) if self.context is None else (x, t, torch.randn(batch, *self.context))

    def ours(self) -> nn.Module:
        """Return our network."""
        heads = {"num_heads": self.heads, "num_head_channels": self.head_width}
        width = None if self.context is None else self.context[1]
        sizes = {"attention_factors": self.attention, "channel_mult": self.mult, "context_dim": width}
        return UNet(self.channels, self.channels, self.width, **sizes, **heads)

    def diffusers(self) -> nn.Module:
        """Return that of diffusers."""
        import diffusers

        has_attention = [2**level in self.attention for level in range(len(self.mult))]
        kind, options = ("Attn", {"attention_head_dim": self.head_width})
        if self.context is not None:
            kind = "CrossAttn"
            options = {"cross_attention_dim": self.context[1], "attention_head_dim": self.heads}
        cls = diffusers.UNet2DModel if self.context is None else diffusers.UNet2DConditionModel
        network = cls(
            sample_size=self.side, in_channels=self.channels, out_channels=self.channels, layers_per_block=2,
            block_out_channels=tuple(self.width * mult for mult in self.mult),
            down_block_types=tuple(f"{kind}DownBlock2D" if has else "DownBlock2D" for has in has_attention),
            up_block_types=tuple(f"{kind}UpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
            **options,
        )  # fmt: skip
        return Sample(network)

    def compvis(self, checkout: Path) -> nn.Module:
        """Return that of a checkout, which is read from there and not copied."""
        module = from_checkout(checkout, "ldm.modules.diffusionmodules.openaimodel")
        heads = {"num_heads": self.heads or -1, "num_head_channels": self.head_width or -1}
        context = {} if self.context is None else {"use_spatial_transformer": True, "context_dim": self.context[1]}
        return module.UNetModel(
            self.side, self.channels, self.width, self.channels, 2, self.attention, channel_mult=self.mult,
            use_checkpoint=False, legacy=False, **heads, **context,
        )  # fmt: skip


@dataclass(frozen=True)
class AutoencoderSize:
    """A KL-regularised autoencoder, from image to image."""

    side: int
    width: int
    mult: tuple[int, ...]
    latent: int

    def inputs(self, batch: int) -> Inputs:
        """Return images."""
        return (torch.randn(batch, 3, self.side, self.side).clamp(-1, 1),)

    def ours(self) -> nn.Module:
        """Return our network."""
        parts = Architecture(channels=self.width, channel_mult=self.mult, z_channels=self.latent, resolution=self.side)
        return Reconstruct(Autoencoder(parts, KL(), embed_dim=self.latent))

    def diffusers(self) -> nn.Module:
        """Return that of diffusers."""
        import diffusers

        levels = len(self.mult)
        network = diffusers.AutoencoderKL(
            block_out_channels=tuple(self.width * mult for mult in self.mult), latent_channels=self.latent,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2, sample_size=self.side,
        )  # fmt: skip
        return Sample(network)

    def compvis(self, checkout: Path) -> nn.Module:
        """Return encoder and decoder of a checkout, one after the other."""
        module = from_checkout(checkout, "ldm.modules.diffusionmodules.model")
        options = {
            "ch": self.width, "out_ch": 3, "ch_mult": self.mult, "num_res_blocks": 2, "attn_resolutions": [],
            "in_channels": 3, "resolution": self.side, "z_channels": self.latent,
        }  # fmt: skip
        return nn.Sequential(module.Encoder(**options, double_z=False), module.Decoder(**options))


MODELS: dict[str, UNetSize | AutoencoderSize] = {
    "ffhq": UNetSize(3, 64, 224, (1, 2, 3, 4), (8, 4, 2), head_width=32),
    "cin": UNetSize(3, 64, 192, (1, 2, 3, 5), (8, 4, 2), heads=1, context=(1, 512)),
    "txt2img": UNetSize(4, 32, 320, (1, 2, 4, 4), (4, 2, 1), heads=8, context=(77, 1280)),
    "kl8": AutoencoderSize(256, 128, (1, 2, 4, 4), 4),
    "tiny": UNetSize(4, 16, 32, (1, 2), (2,), heads=2, context=(5, 16)),
    "tiny_kl": AutoencoderSize(32, 32, (1, 2), 4),
}


class Reconstruct(nn.Module):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.encode_mode(x))


class Obvious(nn.Module):
    """A network of ours whose attention materialises its weights, in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _einsum_attention
        try:
            with torch.autocast(inputs[0].device.type, enabled=False):
                return self.network(*inputs)
        finally:
            F.scaled_dot_product_attention = fused


def _einsum_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    weights = torch.einsum("...id,...jd->...ij", q, k) * q.shape[-1] ** -0.5
    weights = weights if attn_mask is None else weights + attn_mask
    return torch.einsum("...ij,...jd->...id", weights.softmax(-1), v)


class Walk(nn.Module):
    """Samples of a network of ours by DDIM, guided if it has a context; weights in half precision if asked."""

    def __init__(self, size: UNetSize, steps: int, graphs: bool, half: bool) -> None:
        super().__init__()
        conditioner, self.guidance = None, 1.0
        if size.context is not None:
            conditioner, self.guidance = EmbeddingConditioner("context", size.context[1], size.context[0]), 5.0
        parts = (awaken(size.ours()), IdentityAutoencoder(size.channels), DiscreteVP.linear())
        self.model = LatentDiffusion(*parts, conditioner).eval().requires_grad_(False)
        self.sampler, self.graphs, self.dtype = DDIM(steps), graphs, torch.bfloat16 if half else None
        if half:
            store_in_half(self.model.model, self.dtype)

    def forward(self, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        conditions = {"context": context[0]} if context else {}
        request = Request(
            range(len(x)), tuple(x.shape[2:]), conditions, self.guidance, len(x), self.dtype, graphs=self.graphs
        )
        (images,) = generate(self.model, self.sampler, request)
        return images


class Sample(nn.Module):
    """A network of diffusers, whose output is an object."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs).sample


def from_checkout(checkout: Path, name: str) -> Any:
    """Import a module of a package `ldm` that lies elsewhere, beside ours."""
    ours = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == "ldm"}
    sys.path.insert(0, str(checkout))
    try:
        spec = importlib.util.spec_from_file_location(name, checkout / f"{name.replace('.', '/')}.py")
        if spec is None or not Path(str(spec.origin)).is_file():
            sys.exit(f"error: --compvis {checkout}: has no {name}; give a checkout of CompVis/latent-diffusion")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(checkout))
        for key in [key for key in sys.modules if key.split(".")[0] == "ldm"]:
            del sys.modules[key]
        sys.modules.update(ours)


def awaken(network: nn.Module) -> nn.Module:
    """Give zero-initialised weights values, so that every layer matters."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network
