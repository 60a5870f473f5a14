"""The model that one holds in a notebook: load, sample, save; what it does with sizes and samplers, what it refuses."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import diffusion_config, write_run

from ldm.diffusion.discrete import DiscreteVP
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.guidance import Guidance
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_model
from ldm.sampling import sampler_names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a text-conditional model of images of 16 x 16."""
    return write_run(tmp_path_factory.mktemp("runs") / "text", diffusion_config(tiny.text_config(16), context_dim=16))


@pytest.fixture(scope="module")
def model(run):
    return LatentDiffusion.from_pretrained(run)


@pytest.fixture(scope="module")
def unconditional():
    return tiny.latent_diffusion(tiny.unet(), tiny.autoencoder()).model.eval()


TEXTS = ["a red circle above a blue square", "a green triangle"]


def test_three_lines_of_a_notebook(run, tmp_path):
    model = LatentDiffusion.from_pretrained(run)
    images = model.sample(TEXTS, steps=2, guidance=3.0, seed=0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and not images.requires_grad
    again = LatentDiffusion.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.sample(TEXTS, steps=2, guidance=3.0, seed=0), images)


def test_an_image_depends_on_its_seed_not_on_the_batch(model):
    whole = model.sample(TEXTS * 2, steps=2, seed=3)
    parts = model.sample(TEXTS * 2, steps=2, seed=3, batch_size=1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.sample(TEXTS[1:], steps=2, seed=4)[0], whole[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[0], whole[2])


def test_size_guidance_and_options_of_the_sampler(model):
    (image,) = model.sample(TEXTS[:1], steps=2, size=(24, 32))
    assert image.shape == (3, 24, 32)
    plain = model.sample(TEXTS[:1], steps=2)
    unlike = model.sample(TEXTS[:1], steps=2, guidance=Guidance(3.0, negative="a green triangle"))
    assert torch.equal(unlike, model.sample(TEXTS[:1], steps=2, guidance=3.0, negative=["a green triangle"]))
    assert not torch.equal(plain, model.sample(TEXTS[:1], steps=2, guidance=3.0))
    assert not torch.equal(plain, model.sample(TEXTS[:1], steps=2, eta=1.0))
    assert not torch.equal(plain, model.sample(TEXTS[:1], steps=2, grid="karras"))


def test_a_negative_is_what_guidance_goes_away_from(model):
    plain = model.sample(TEXTS, steps=2)
    torch.testing.assert_close(model.sample(TEXTS, steps=2, guidance=5.0, negative=TEXTS), plain, atol=1e-4, rtol=1e-4)
    guided = model.sample(TEXTS, steps=2, guidance=5.0)
    assert not torch.allclose(model.sample(TEXTS, steps=2, guidance=5.0, negative=TEXTS[::-1]), guided, atol=1e-3)


@pytest.mark.parametrize("name", sampler_names())
def test_images_to_start_from_stay_the_more_the_weaker_the_change(name):
    process = DiscreteVP.linear(20, 1e-3, 0.3)
    model = tiny.latent_diffusion(tiny.unet(3), IdentityAutoencoder(3), process=process).model.eval()
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    how = {"steps": 20, "sampler": name, "images": images}
    changes = [(model.sample(2, strength=share, **how) - images).square().mean() for share in (0.05, 0.25, 0.5, 1.0)]
    assert changes == sorted(changes) and changes[0] < 0.02 < 0.2 < changes[-1]
    alone = model.sample(1, strength=0.5, seed=1, **{**how, "images": images[1:]})
    torch.testing.assert_close(alone[0], model.sample(2, strength=0.5, **how)[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sampler_names())
def test_every_sampler_by_its_name(unconditional, name):
    assert unconditional.sample(2, steps=3, sampler=name).shape == (2, 3, 8, 8)


def test_a_mapping_conditions_under_its_keys(model):
    given = model.sample({"caption": TEXTS}, steps=2)
    assert torch.equal(given, model.sample(TEXTS, steps=2))


@pytest.mark.parametrize(
    ("conditions", "options", "message"),
    [
        (2, {}, "conditional.*not 2"),
        ({"caption": TEXTS, "label": [1]}, {}, "1 of 'label' for 2 samples"),
        ({"label": [1]}, {}, "no 'caption'"),
        (TEXTS, {"sampler": "no"}, "sampler 'no' is unknown; use one of .*ddim"),
        (TEXTS, {"sampler": "euler", "eta": 1.0}, "euler: has no eta; it has steps"),
        (TEXTS, {"steps": 0}, "steps is 0"),
        (TEXTS, {"grid": "no"}, "grid 'no' is unknown; use one of uniform"),
        (TEXTS, {"size": (10**8, 32)}, "100000000x32: use at most"),
        (TEXTS, {"size": (15, 16)}, "15x16: each side must be a multiple of 2"),
        (TEXTS, {"batch_size": 0}, "batch_size is 0"),
        (TEXTS, {"seed": -1}, "seed -1 is no whole number from 0"),
        (TEXTS, {"seed": 2**64}, "seed 18446744073709551616 is no whole number"),
        (TEXTS, {"negative": TEXTS}, "negative: .*guidance"),
        (TEXTS, {"negative": TEXTS[:1], "guidance": 2.0}, "1 of 'caption' for 2"),
        (TEXTS, {"images": torch.zeros(1, 3, 16, 16)}, "1 of 'images' for 2"),
        (TEXTS, {"images": torch.zeros(2, 3, 16, 15)}, "16x15: each side must be a multiple of 2"),
        (TEXTS, {"images": torch.zeros(2, 3, 16, 16), "strength": 0.0}, "strength is 0"),
        (TEXTS, {"images": torch.zeros(2, 3, 16, 16), "strength": 1.5}, "strength is 1.5"),
    ],
)
def test_mistakes(model, conditions, options, message):
    with pytest.raises(UserError, match=message):
        model.sample(conditions, **{"steps": 2, **options})


def test_a_sequence_needs_one_conditioner(unconditional):
    with pytest.raises(UserError, match="conditioned on nothing; give a mapping"):
        unconditional.sample(TEXTS)


def test_a_damaged_run_is_sampled_from_the_checkpoint_before_and_says_so(run, tmp_path, caplog):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    last, previous = (folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    content = bytearray(shutil.copyfile(last, previous).read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    loaded = load_model(folder)
    assert loaded.checkpoint == previous and str(previous) in loaded.provenance()["checkpoint"]
    (line,) = [record.message for record in caplog.records if "CRC" in record.message]
    assert str(last) in line and "using previous.ckpt" in line


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(UserError, match="config"):
        tiny.class_diffusion().model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        LatentDiffusion.from_pretrained(tmp_path / "nowhere")
