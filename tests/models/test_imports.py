"""What a model costs: the files that are imported, and the frames between a program and the network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pytorch_lightning", "lightning", "transformers", "omegaconf", "argparse", "ldm.cli", "ldm.training")
TINY = """
import torch
from ldm.diffusion.discrete import DiscreteVP
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.networks.unet import UNet
network = UNet(3, 3, 32, num_res_blocks=1, attention_factors=(), channel_mult=(1,), num_heads=1)
model = LatentDiffusion(network, IdentityAutoencoder(3), DiscreteVP.linear(10), latent_size=8).eval()
assert model.sample(2, steps=2).shape == (2, 3, 8, 8)
"""


def imported(program: str) -> list[str]:
    """Return the modules that a new interpreter has after a program, without those of torch alone."""
    shown = "import json\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    code = f"import sys, torch\nbefore = set(sys.modules)\n{program}\n{shown}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ["ldm.models", "ldm.models.latent_diffusion", "ldm.models.tiled"])
def test_models_import_neither_trainer_nor_command_line(module: str) -> None:
    assert not [name for name in HEAVY if name in imported(f"import {module}")]


def test_sampling_needs_at_most_40_files_of_ours() -> None:
    found = imported("from ldm.models.latent_diffusion import LatentDiffusion\n" + TINY)
    ours = [name for name in found if name.split(".")[0] == "ldm"]
    assert len(ours) <= 40, ours
    assert not [name for name in HEAVY if name in found]


def test_the_help_of_the_program_is_fast() -> None:
    """It imports neither torch nor any of its commands."""
    code = "import sys; from ldm.cli.program import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "txt2img" in done.stdout
