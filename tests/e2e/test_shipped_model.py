"""The small model that is shipped draws what it is asked for, from the command line and as an object."""

import json

from ldm.cli import program
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.toy import TEXT_TO_IMAGE
from ldm.toy.scene_detector import verdict
from ldm.toy.shapes import held_out_captions


def test_captions_that_training_never_showed_are_drawn():
    captions = held_out_captions(8)
    model = LatentDiffusion.from_pretrained(TEXT_TO_IMAGE)
    images = model.sample(captions, steps=12, sampler="euler", guidance=3.0, seed=0)
    assert sum(verdict(*pair).is_right for pair in zip(images, captions, strict=True)) >= 7


def test_one_command_draws_a_text(tmp_path):
    assert not program.main(["sample", "a red circle above a blue square", "--outdir", str(tmp_path), "-n", "1"])
    record = json.loads(next(tmp_path.rglob("*.json")).read_text(encoding="utf-8"))
    assert record["checkpoint"] == str(TEXT_TO_IMAGE) and len(list(tmp_path.rglob("*.png"))) >= 1
