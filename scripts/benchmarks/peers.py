"""Measure our networks beside those of diffusers, and of a checkout of CompVis/latent-diffusion if its path is given.

The same architecture, random weights of which none is zero, random input, one process; the sides take turns, so that a
noisy machine disturbs all alike. Reported are medians: milliseconds, peak memory (CUDA), TFLOP/s as torch counts them,
and with --peak the share of what the card can do (MFU). --obvious adds our weights in the obvious formulation (einsum
attention, contiguous layout, float32), --walk a walk of so many DDIM steps with and without CUDA graphs.

    python scripts/benchmarks/peers.py --models ffhq txt2img kl8 --batch 32 --bf16 --peak 989 --json peers.json
    python scripts/benchmarks/peers.py --models tiny --batch 2 --obvious --walk 10      # in seconds, on a CPU
    python scripts/benchmarks/peers.py --models txt2img --batch 1 --walk 50 --bf16      # a text-to-image sample
    python scripts/benchmarks/peers.py --models ffhq --batch 32 --compvis latent-diffusion --bf16
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
from ldm.training.compilation import Compilation

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
        return _Sample(network)

    def compvis(self, checkout: Path) -> nn.Module:
        """Return that of a checkout, which is read from there and not copied."""
        module = _from_checkout(checkout, "ldm.modules.diffusionmodules.openaimodel")
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
        return _Reconstruct(Autoencoder(parts, KL(), embed_dim=self.latent))

    def diffusers(self) -> nn.Module:
        """Return that of diffusers."""
        import diffusers

        levels = len(self.mult)
        network = diffusers.AutoencoderKL(
            block_out_channels=tuple(self.width * mult for mult in self.mult), latent_channels=self.latent,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2, sample_size=self.side,
        )  # fmt: skip
        return _Sample(network)

    def compvis(self, checkout: Path) -> nn.Module:
        """Return encoder and decoder of a checkout, one after the other."""
        module = _from_checkout(checkout, "ldm.modules.diffusionmodules.model")
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


class _Reconstruct(nn.Module):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.encode_mode(x))


class _Obvious(nn.Module):
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


class _Walk(nn.Module):
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


class _Sample(nn.Module):
    """A network of diffusers, whose output is an object."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs).sample


def _from_checkout(checkout: Path, name: str) -> Any:
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


def run(network: nn.Module, inputs: Inputs, backward: bool, half: bool) -> None:
    """Make one pass."""
    network.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=half):
        output = network(*inputs)
    if backward:
        output.float().square().mean().backward()


Row = dict[str, Any]


def measure(sides: dict[str, nn.Module], inputs: Inputs, backward: bool, half: bool, turns: int) -> list[Row]:
    """Return a row for each side: median milliseconds, peak memory in GiB (None on a CPU), FLOPs of a pass."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = dict.fromkeys(sides)
    flops = {}
    for turn in range(turns + 2):  # two warm up
        for name, network in sides.items():
            if turn == 0:
                with FlopCounterMode(display=False) as counter:
                    run(network, inputs, backward, half)
                flops[name] = counter.get_total_flops()
            network.to(inputs[0].device)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            _synchronize()
            start = time.perf_counter()
            run(network, inputs, backward, half)
            _synchronize()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - start))
            if torch.cuda.is_available():
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return [
        {"side": name, "ms": statistics.median(times[name]), "gib": peaks[name], "flops": flops[name]} for name in sides
    ]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def awaken(network: nn.Module) -> nn.Module:
    """Give zero-initialised weights values, so that every layer matters."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def main() -> None:
    """Print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["ffhq", "cin", "txt2img", "kl8"])
    add("--batch", type=int, default=1)
    add("--turns", type=int, default=5, help="timed turns of each side")
    add("--bf16", action="store_true", help="bfloat16 autocast on all sides")
    add("--compile", action="store_true", help="also ours, compiled by block")
    add("--obvious", action="store_true", help="also ours with einsum attention and contiguous images, in float32")
    add("--walk", type=int, metavar="STEPS", help="also a walk of so many steps of our U-Nets")
    add("--compvis", type=Path, metavar="DIR", help="a checkout of CompVis/latent-diffusion")
    add("--peak", type=float, metavar="TFLOPS", help="what the card can do, for MFU")
    add("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    about = {"device": name, "torch": torch.__version__, "date": str(date.today()), "batch": options.batch}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    print(f"{'model':10} {'pass':8} {'side':15} {'ms':>9} {'GiB':>6} {'TFLOP/s':>8} {'MFU':>6} {'of ours':>8}")
    rows = []
    for model in options.models:
        size, layout = MODELS[model], torch.channels_last if device.type == "cuda" else torch.preserve_format
        torch.manual_seed(0)
        inputs = tuple(value.to(device) for value in size.inputs(options.batch))
        makers: dict[str, Callable[[], nn.Module]] = {"ours": size.ours, "diffusers": size.diffusers}
        if options.compile:
            makers["ours, compiled"] = size.ours
        if options.obvious:
            makers["obvious"] = lambda size=size: _Obvious(size.ours())
        if options.compvis is not None:
            makers["CompVis"] = lambda size=size: size.compvis(options.compvis)
        sides = {side: awaken(make()).to(device) for side, make in makers.items()}
        for side, network in sides.items():
            if side.startswith("ours"):
                network.to(memory_format=layout)
            if side == "ours, compiled":
                Compilation().apply([network] if isinstance(network, UNet) else network.autoencoder.children())
        walks = {}
        if options.walk and isinstance(size, UNetSize):
            makers = {"ours": True, "ours, no graphs": False}
            walks = {side: _Walk(size, options.walk, has, options.bf16).to(device) for side, has in makers.items()}
            for network in walks.values():
                network.to(memory_format=layout)
        passes = {"forward": (sides, False), "training": (sides, True), "walk": (walks, False)}
        for name, (networks, backward) in passes.items():
            measured = measure(networks, inputs, backward, options.bf16, options.turns)
            for row in measured:
                if name == "walk":
                    row["flops"] = measured[-1]["flops"]  # a replay hides its own from the counter
                rate = row["flops"] / row["ms"] / 1e9
                row |= {"model": model, "pass": name, "tflops": rate}
                row |= {"mfu": None if options.peak is None else rate / options.peak}
                row["of_ours"] = row["ms"] / measured[0]["ms"]
                gib, mfu = (f"{row['gib']:.2f}" if row["gib"] else ""), (f"{row['mfu']:.1%}" if row["mfu"] else "")
                print(f"{model:10} {row['pass']:8} {row['side']:15} {row['ms']:9.2f} {gib:>6} {rate:8.2f} {mfu:>6} "
                      f"{row['of_ours']:7.2f}x", flush=True)  # fmt: skip
            rows += measured
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
