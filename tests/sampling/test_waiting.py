"""Nothing in a walk waits for the device: seen without one, on tensors without data."""

from __future__ import annotations

import pytest
import tiny
import torch
from without_device import on_cuda

from ldm.models.guidance import Guidance
from ldm.sampling import make_sampler, sampler_names
from ldm.sampling.base import SeededNoise


@pytest.mark.parametrize("guidance", [1.0, 3.0, Guidance(3.0, interval=(0.2, 0.8))])
@pytest.mark.parametrize("name", sampler_names())
def test_nothing_in_a_walk_waits(name: str, guidance: float | Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.class_diffusion().model.eval().requires_grad_(False)
    with torch.no_grad(), on_cuda(monkeypatch, model) as waits:
        condition = model.condition({"class_label": torch.tensor([0, 1])})
        denoise = model.denoiser(condition, guidance)
        x = torch.randn(2, tiny.CHANNELS, 4, 4, device="cuda")
        steps = make_sampler(name, steps=6)(denoise, x, model.process, noise=SeededNoise([1, 2], "cuda"))
        next(steps)  # reads the levels of the walk
        waits.found.clear()
        assert len(list(steps)) >= 1
    assert not waits.found
