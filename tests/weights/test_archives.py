"""Published zip files: a checkpoint in an archive, with or without its config."""

import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from tiny import autoencoder_config, node, unet_config

from ldm.config import instantiate
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.weights.load import load_into, metadata, read

PROCESS = node("diffusion.discrete.DiscreteVP.linear", num_steps=4)
PARTS = {"network": unet_config(), "autoencoder": autoencoder_config(), "process": PROCESS}
MODEL = node("models.latent_diffusion.LatentDiffusion", **PARTS)


def published(folder: Path, state: dict, config: object = None, name: str = "model.ckpt") -> Path:
    """Write a zip as the original's authors published them."""
    checkpoint = folder / "original.pt"
    torch.save({"state_dict": state, "global_step": 3}, checkpoint)
    path = folder / "celeba.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(checkpoint, name)
        if config is not None:
            archive.writestr("config.yaml", yaml.safe_dump(config))
    checkpoint.unlink()
    return path


def test_a_model_is_loaded_from_a_zip_with_its_config(tmp_path: Path) -> None:
    model = instantiate(MODEL)
    path = published(tmp_path, model.state_dict(), {"model": MODEL})
    loaded = LatentDiffusion.from_pretrained(path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]
    LatentDiffusion.from_pretrained(path.rename(tmp_path / "celeba.ckpt"))  # whatever it is called


def test_a_zip_without_a_config_asks_for_one(tmp_path: Path) -> None:
    path = published(tmp_path, {"weight": torch.ones(2)}, name="celeba/model.ckpt")
    assert torch.equal(read(path)["weight"], torch.ones(2)) and metadata(path) == {}
    with pytest.raises(UserError, match="give --config YAML"):
        LatentDiffusion.from_pretrained(path)


def test_zips_that_cannot_be_read_are_named_in_one_line(tmp_path: Path) -> None:
    path = published(tmp_path, {"weight": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("last.ckpt", b"x")
    with pytest.raises(UserError, match="holds model.ckpt, last.ckpt") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=str(path)):
        read(path)


def test_an_autoencoder_takes_its_weights_from_a_latent_diffusion_model() -> None:
    model, first_stage = instantiate(MODEL), instantiate(autoencoder_config())
    assert load_into(first_stage, model.state_dict()).fits
    want = model.first_stage_model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in first_stage.state_dict().items())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_compressed_by_a_rare_method_is_not_unpacked(method: int, tmp_path: Path) -> None:
    """The header of one alone may ask for gigabytes, and their damage is told by errors of their own."""
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model.ckpt", b"x" * 1000)
        archive.writestr("config.yaml", b"model: {}")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    for take in (read, metadata):
        with pytest.raises(UserError, match="rare method; unpack it"):
            take(path)
