"""What a model costs: the files that are imported, and the frames between a program and the network."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pytorch_lightning", "lightning", "transformers", "omegaconf", "argparse", "ldm.cli", "ldm.training")
TINY = """
import torch
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.diffusion.discrete import DiscreteVP
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.networks.unet import UNet
network = UNet(3, 3, 32, num_res_blocks=1, attention_factors=(), channel_mult=(1,), num_heads=1)
model = LatentDiffusion(network, IdentityAutoencoder(3), DiscreteVP.linear(10), latent_size=8).eval()
assert model.sample(2, steps=2).shape == (2, 3, 8, 8)
"""


def imported(*programs: str) -> list[list[str]]:
    """Return the modules that a new interpreter has after each of some programs, without those of torch alone."""
    shown = "print('modules', json.dumps(sorted(set(sys.modules) - before)))"
    code = "\n".join(["import sys, json, torch\nbefore = set(sys.modules)", *(f"{one}\n{shown}" for one in programs)])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line.removeprefix("modules ")) for line in done.stdout.splitlines() if "modules" in line]


def test_models_need_few_files_and_neither_the_trainer_nor_the_command_line() -> None:
    every = ", ".join(f"ldm.models.{path.stem}" for path in (ROOT / "ldm" / "models").glob("[!_]*.py"))
    wanted = ("txt2img", "inpaint", "layout2img", "evaluate", "export")
    scripts = "import " + ", ".join(f"ldm.cli.{name}" for name in wanted)
    sampling, all_models, all_scripts = imported(TINY, f"import ldm.models, {every}", scripts)
    ours = [name for name in sampling if name.split(".")[0] == "ldm"]
    assert 10 < len(ours) <= 40, ours
    assert not [name for name in HEAVY if name in sampling]
    assert [name for name in HEAVY if name in all_models] == ["omegaconf"]  # which reads the configs of run folders
    assert not {"pytorch_lightning", "lightning", "transformers"} & {*all_scripts}


def test_the_help_of_the_program_is_fast() -> None:
    """It imports neither torch nor any of its commands."""
    code = "import sys; from ldm.cli.program import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "txt2img" in done.stdout
