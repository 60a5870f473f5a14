"""Measure the networks against the obvious formulation: einsum attention, contiguous layout, float32.

Same weights, same input, one process. The two formulations take turns, so that a noisy machine disturbs both alike,
and the figure reported is the median of the ratios (obvious time / our time; above 1 is faster).

    python scripts/benchmarks/speed.py --models ffhq cin autoencoder --batch 1 4
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.autoencoder.regularizers import KL
from ldm.models.autoencoder import Autoencoder
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.unet import UNet

Run = Callable[[], Tensor]


def ffhq(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the U-Net of ffhq256 (274M parameters) and an input of 64x64 latents."""
    network = UNet(3, 3, 224, attention_factors=(8, 4, 2), channel_mult=(1, 2, 3, 4), num_head_channels=32)
    return network, (torch.randn(batch, 3, 64, 64), torch.full((batch,), 500))


def cin(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the U-Net of cin256-v2 (401M parameters, cross-attention, one head) and its inputs."""
    network = UNet(3, 3, 192, attention_factors=(8, 4, 2), channel_mult=(1, 2, 3, 5), num_heads=1, context_dim=512)
    return network, (torch.randn(batch, 3, 64, 64), torch.full((batch,), 500), torch.randn(batch, 1, 512))


def autoencoder(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the f=4 KL autoencoder (55M parameters), encoder to decoder, and 256x256 images."""

    class Reconstruct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.autoencoder = Autoencoder(Architecture(channel_mult=(1, 2, 4), z_channels=3), KL(), embed_dim=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.autoencoder.decode(self.autoencoder.encode_mode(x))  # without noise, to be compared

    return Reconstruct(), (torch.randn(batch, 3, 256, 256).clamp(-1, 1),)


MODELS = {"ffhq": ffhq, "cin": cin, "autoencoder": autoencoder}


@contextmanager
def einsum_attention() -> Iterator[None]:
    """Replace the fused attention by the textbook one, which materialises all the attention weights."""
    calls = 0

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: float) -> Tensor:
        nonlocal calls
        calls += 1
        scale = options.get("scale") or q.shape[-1] ** -0.5
        weights = torch.einsum("...id,...jd->...ij", q, k) * scale
        if attn_mask is not None:
            weights = weights.masked_fill(~attn_mask, torch.finfo(weights.dtype).min)
        return torch.einsum("...ij,...jd->...id", weights.softmax(-1), v)

    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
    if not calls:
        raise RuntimeError("the networks did not go through scaled_dot_product_attention: nothing was compared")


def formulations(network: nn.Module, inputs: tuple[Tensor, ...], backward: bool, half: bool) -> dict[str, Run]:
    """Return the callables to compare; both use the same parameters, whose layout each sets before it runs."""
    device = inputs[0].device.type

    def run(layout: torch.memory_format, attention: Callable, precision: Callable) -> Tensor:
        x, *others = inputs
        x = x.to(memory_format=layout)
        with torch.set_grad_enabled(backward), attention(), precision():
            output = network(x, *others)
        if backward:
            network.zero_grad(set_to_none=True)
            output.float().square().mean().backward()
        return output

    def bfloat16() -> torch.autocast:
        return torch.autocast(device, dtype=torch.bfloat16)

    return {
        "obvious": lambda: run(torch.contiguous_format, einsum_attention, nullcontext),
        "ours": lambda: run(torch.channels_last, nullcontext, bfloat16 if half else nullcontext),
    }


def compare(network: nn.Module, runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Time the runs in turns and return medians in seconds, the ratio and the largest difference of the outputs."""
    layouts = {"obvious": torch.contiguous_format, "ours": torch.channels_last}
    times: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for repeat in range(repeats + 1):  # the first turn warms up
        for name, run in runs.items():
            network.to(memory_format=layouts[name])
            _synchronize()
            start = time.perf_counter()
            outputs[name] = run().detach()
            _synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    difference = (outputs["obvious"] - outputs["ours"]).abs().max() / outputs["obvious"].abs().max()
    return {
        "obvious_s": statistics.median(times["obvious"]),
        "ours_s": statistics.median(times["ours"]),
        "ratio": statistics.median(a / b for a, b in zip(times["obvious"], times["ours"], strict=True)),
        "relative_difference": difference.item(),
    }


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _awaken(network: nn.Module) -> None:
    """Return the zero-initialised layers weights, so that every layer matters to the output."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each formulation")
    parser.add_argument("--bf16", action="store_true", help="our side in bfloat16 autocast")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    precision = "bf16" if options.bf16 else "fp32"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, ours in {precision}")
    print(f"{'model':12} {'batch':>5} {'pass':>17} {'obvious':>9} {'ours':>9} {'ratio':>6} {'difference':>11}")
    rows = []
    for model in options.models:
        for batch in options.batch:
            torch.manual_seed(0)
            network, inputs = MODELS[model](batch)
            _awaken(network)
            network, inputs = network.to(device), tuple(value.to(device) for value in inputs)
            for backward in (False, True):
                runs = formulations(network, inputs, backward, options.bf16)
                row = compare(network, runs, options.repeats)
                label = "forward+backward" if backward else "forward"
                print(
                    f"{model:12} {batch:5} {label:>17} {row['obvious_s']:8.3f}s {row['ours_s']:8.3f}s "
                    f"{row['ratio']:6.2f} {row['relative_difference']:11.1e}",
                    flush=True,
                )
                rows.append({"model": model, "batch": batch, "pass": label, **row})
    if options.json:
        options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
