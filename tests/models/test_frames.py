"""From a program and from a training step to the network: few frames of ours, counted inside of its forward."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import diffusion_config, script, write_run

from ldm.networks.unet import UNet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stacks(monkeypatch):
    """Record at each call of a U-Net the names of our functions on the stack, the outermost first."""
    found, forward = [], UNet.forward

    def recorded(self, *args, **kwargs):
        frame, names = sys._getframe(1), ["UNet.forward"]
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if ROOT / "ldm" in file.parents or ROOT / "scripts" in file.parents:
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        found.append(names[::-1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", recorded)
    return found


@pytest.mark.parametrize("guidance", ["1", "5"])
def test_from_txt2img_to_the_network(stacks, tmp_path, guidance):
    run = write_run(tmp_path / "run", diffusion_config(tiny.text_config(16), context_dim=16))
    main = script("txt2img").main
    main(["--run", str(run), "--outdir", str(tmp_path / "out"), "--steps", "2", "--scale", guidance, "--device", "cpu",
          "--n_samples", "1"])  # fmt: skip
    assert len(stacks) == 2
    guard, *names = stacks[0]  # the guard, which turns mistakes into one line, is around every program
    assert guard.startswith("main_guard.") and len(names) <= 7, names


def test_from_a_training_step_to_the_network(stacks):
    batch = {"image": torch.rand(2, 3, 8, 8), "class_label": torch.tensor([0, 1])}
    tiny.class_diffusion().training_step(batch, 0)
    assert len(stacks) == 1 and stacks[0][0].endswith("training_step") and len(stacks[0]) <= 4, stacks
