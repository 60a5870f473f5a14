"""Sampling on CUDA: graphs give the eager numbers or fall back in one line; nothing in a walk waits for the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm.models.generate import Request, generate
from ldm.models.graphs import graphed
from ldm.models.guidance import Guidance
from ldm.models.inpainting import InpaintingTarget
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.tiled import tile
from ldm.networks.layers import store_in_half
from ldm.sampling import make_sampler
from ldm.sampling.base import SeededNoise

SIZE = (tiny.SIZE, tiny.SIZE)
HALF = {"autocast": torch.bfloat16}
INTERVAL = Guidance(3.0, interval=(0.2, 0.8))


def model() -> LatentDiffusion:
    return tiny.class_diffusion().model.eval().requires_grad_(False).cuda()


def draw(model: LatentDiffusion, count: int = 2, size: tuple[int, int] = SIZE, **how: object) -> Tensor:
    request = Request(range(count), size, {"class_label": torch.arange(count) % 3}, **how)
    return torch.cat(list(generate(model, make_sampler("ddim", steps=6, eta=1.0), request)))


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"guidance": 3.0},
        {"guidance": INTERVAL},
        {"guidance": Guidance(3.0, apg_momentum=-0.5)},
        {"target": InpaintingTarget(torch.rand(2, 3, *SIZE), (torch.rand(2, 1, *SIZE) > 0.5).float())},
        HALF,
    ],
)
def test_graphs_give_the_eager_numbers(way: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    own = model()
    eager = draw(own, graphs=False, **way)
    with caplog.at_level(logging.WARNING):
        recorded = [draw(own, **way) for _ in range(2)]
    assert len(own.graphs) >= 1 and "CUDA graphs" not in caplog.text
    for images in recorded:
        torch.testing.assert_close(images, eager, rtol=1e-3, atol=1e-3)


def test_graphs_of_tiles_and_of_weights_that_move() -> None:
    own = model()
    tiles = tile(own, 8)
    torch.testing.assert_close(
        draw(tiles, size=(16, 24)), draw(tiles, size=(16, 24), graphs=False), rtol=1e-3, atol=1e-3
    )
    assert len(own.graphs) == 1
    own.model.diffusion_model.out[-1].weight.data = own.model.diffusion_model.out[-1].weight.data * 2
    torch.testing.assert_close(draw(own), draw(own, graphs=False), rtol=1e-3, atol=1e-3)


def test_weights_in_half_are_those_of_autocast() -> None:
    plain, half = model(), model()
    store_in_half(half.model, torch.bfloat16)
    torch.testing.assert_close(draw(half, **HALF), draw(plain, **HALF, graphs=False), rtol=1e-3, atol=1e-3)


def test_what_waits_for_the_device_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.isfinite().all().item())

    own = model()
    own.model.diffusion_model.out.append(Waits())
    with caplog.at_level(logging.WARNING):
        images = [draw(own), draw(own)]
    (line,) = [line for line in caplog.messages if "CUDA graphs" in line]
    assert len(line) < 300 and len(own.graphs) == 0
    for image in images:
        torch.testing.assert_close(image, draw(own, graphs=False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0, INTERVAL])
def test_nothing_in_a_walk_waits_for_the_device(guidance: Guidance | float) -> None:
    own = model()
    condition = own.condition({"class_label": torch.tensor([0, 1])})
    for is_warm in (False, True):
        denoise = own.denoiser(condition, guidance, network=graphed(own))
        x = torch.randn(2, tiny.CHANNELS, 4, 4, device="cuda")
        steps = make_sampler("ddim", steps=6, eta=1.0)(denoise, x, own.process, noise=SeededNoise([1, 2], "cuda"))
        next(steps)  # reads the levels of the walk
        if not is_warm:
            list(steps)
            continue
        with no_waiting():
            list(steps)


def test_memory_of_graphs_is_given_back() -> None:
    own = model()
    draw(own)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    own.graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= held
    torch.testing.assert_close(draw(own), draw(own, graphs=False), rtol=1e-3, atol=1e-3)
