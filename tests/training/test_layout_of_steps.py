"""Images lie channels last from end to end of a step on CUDA, as it is counted: no copies, no norm by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.cli.arguments import parse
from ldm.cli.train import plan_of
from ldm.training.cost import StepCounter, Way, _size
from ldm.training.run import build_without_memory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = [  # one of each kind of network and condition
    "autoencoder/kl_f8",
    "autoencoder/vq_f4_noattn",
    "ldm/ffhq",
    "ldm/txt2img",
    "ldm/inpainting_big",
    "ldm/class2img_f4",
    "ldm/semantic_synthesis_256",
    "ldm/superres_bsr",
    "ldm/lightningdit_xl",
]
SMALL = ["demo/autoencoder_shapes", "demo/txt2img_shapes"]
NAMES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED)]
FEW = 16  # channels of images and latents, whose copies at the ends of a network cost nothing


class Copies(TorchDispatchMode):
    """Note the copies of maps to another layout, and normalisations by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **(kwargs or {})), func._overloadpacket.__name__
        if name == "native_group_norm":
            self.found.append(f"{name} of {tuple(args[0].shape)}")
        if name in ("clone", "copy_", "_to_copy") and isinstance(made, Tensor) and made.dim() == 4:
            source = args[1] if name == "copy_" else args[0]
            if source.shape == made.shape and source.stride() != made.stride() and made.shape[1] > FEW:
                self.found.append(f"{name} of {tuple(source.shape)}: {source.stride()} to {made.stride()}")
        return made


def counter(name: str, way: Way, precision: str = "bf16-mixed") -> StepCounter:
    plan = plan_of(parse(["-b", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--accelerator", "gpu"]))
    training = build_without_memory(plan)
    return StepCounter(training, _size(training, None), precision, way)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_copies_no_layout_and_every_norm_is_ours(name: str) -> None:
    count = counter(name, Way(kernels=True, channels_last=True))
    with Copies() as copies:
        count(1)
    # Maps of classes, which are read from files in the layout of images, are copied once, before the first convolution.
    of_data = [found for found in copies.found if name.startswith("ldm/semantic") and "(1, 182," in found]
    assert len(of_data) <= 1 and copies.found == of_data


def test_without_kernels_norms_are_torch_s_and_keep_more() -> None:
    name = "demo/autoencoder_shapes"
    ours, torchs = (counter(name, Way(kernels, channels_last=True)) for kernels in (True, False))
    with Copies() as copies:
        kept = torchs(4).activations
    assert copies.found
    assert ours(4).activations < kept
