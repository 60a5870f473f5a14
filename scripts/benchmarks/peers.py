"""Measure our networks beside those of diffusers, and of a checkout of CompVis/latent-diffusion if its path is given.

The same architecture, random weights of which none is zero, random input, one process; the sides take turns, so that a
noisy machine disturbs all alike. Reported are medians: milliseconds, TFLOP/s as torch counts them, and with --peak the
share of what the card can do (MFU); and on CUDA the memory of a side alone at its peak. --step adds the whole step of a
training (forward, backward, clipping, AdamW, average of the weights, each side by its own means), --obvious our weights
in the obvious formulation (einsum attention, contiguous layout, float32), --walk a walk of so many DDIM steps with and
without CUDA graphs.

    python scripts/benchmarks/peers.py --models ffhq txt2img kl8 --batch 32 --bf16 --step --peak 989 --json peers.json
    python scripts/benchmarks/peers.py --models tiny --batch 2 --step --obvious --walk 10  # in seconds, on a CPU
    python scripts/benchmarks/peers.py --models txt2img --batch 1 --walk 50 --bf16      # a text-to-image sample
    python scripts/benchmarks/peers.py --models ffhq --batch 32 --compvis latent-diffusion --bf16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_networks import MODELS, Inputs, Obvious, UNetSize, Walk, awaken, from_checkout
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ldm.networks.unet import UNet
from ldm.training.compilation import Compilation
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.optimization import Optimization, clip_gradients

Row = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """What is timed, the network that it is of, and what else stays in memory between turns."""

    run: Callable[[], None]
    network: nn.Module
    kept: Callable[[], Iterable[Any]] = tuple

    def held(self) -> int:
        """Return the bytes that stay in memory between turns."""
        tensors = [*self.network.parameters(), *self.network.buffers(), *self.kept()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def forward(network: nn.Module, inputs: Inputs, half: bool, backward: bool = False) -> None:
    """Make a forward pass, and the backward pass of the mean square of the output."""
    network.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=half):
        output = network(*inputs)
    if backward:
        output.float().square().mean().backward()


def training_step(side: str, network: nn.Module, inputs: Inputs, half: bool, checkout: Path | None) -> Pass:
    """Return the whole step of a training by the means of a side: ours, those of diffusers or of CompVis."""
    parameters, clip = list(network.parameters()), 1.0
    if side.startswith("ours"):
        optimizer = Optimization().build([{"params": parameters}], 1e-5, fused=True)
        average = ExponentialMovingAverage(network)
        averages, move = average.buffers, partial(average.update, network)
    elif side == "diffusers":
        from diffusers.training_utils import EMAModel

        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        average = EMAModel(parameters, decay=0.9999)
        averages, move = lambda: average.shadow_params, partial(average.step, parameters)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        average = from_checkout(checkout, "ldm.modules.ema").LitEma(network).to(inputs[0].device)
        averages, move = average.buffers, partial(average, network)

    def step() -> None:
        forward(network, inputs, half, backward=True)
        if side.startswith("ours"):
            clip_gradients([parameters], clip)
        else:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        move()

    return Pass(step, network, lambda: [*tree_leaves([*optimizer.state.values()]), *averages()])


def measure(sides: dict[str, Pass], turns: int) -> list[Row]:
    """Return a row for each side: median milliseconds, its own peak memory in GiB (None on a CPU), FLOPs of a pass."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = dict.fromkeys(sides)
    flops = {}
    for turn in range(turns + 2):  # two warm up
        for name, one in sides.items():
            if turn == 0:
                with FlopCounterMode(display=False) as counter:
                    one.run()
                flops[name] = counter.get_total_flops()
            _synchronize()
            others = torch.cuda.memory_allocated() - one.held() if torch.cuda.is_available() else 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            one.run()
            _synchronize()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - start))
            if torch.cuda.is_available():
                peaks[name] = (torch.cuda.max_memory_allocated() - others) / 2**30
            one.network.zero_grad(set_to_none=True)
    return [
        {"side": name, "ms": statistics.median(times[name]), "gib": peaks[name], "flops": flops[name]} for name in sides
    ]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    """Print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["ffhq", "cin", "txt2img", "kl8"])
    add("--batch", type=int, default=1)
    add("--turns", type=int, default=5, help="timed turns of each side")
    add("--bf16", action="store_true", help="bfloat16 autocast on all sides")
    add("--compile", action="store_true", help="also ours, compiled by block")
    add("--step", action="store_true", help="also the whole step of a training, with optimiser and average")
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
            makers["obvious"] = lambda size=size: Obvious(size.ours())
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
            walks = {side: Walk(size, options.walk, has, options.bf16).to(device) for side, has in makers.items()}
            for network in walks.values():
                network.to(memory_format=layout)
        half = options.bf16
        passes: dict[str, dict[str, Pass]] = {
            "forward": {side: Pass(partial(forward, one, inputs, half), one) for side, one in sides.items()},
            "training": {side: Pass(partial(forward, one, inputs, half, True), one) for side, one in sides.items()},
            "walk": {side: Pass(partial(forward, one, inputs, half), one) for side, one in walks.items()},
        }
        if options.step:
            trained = {side: network for side, network in sides.items() if side != "obvious"}
            passes["step"] = {
                side: training_step(side, network, inputs, half, options.compvis) for side, network in trained.items()
            }
        for name, runs in passes.items():
            measured = measure(runs, options.turns)
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
