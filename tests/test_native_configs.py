"""Every config of the project is valid and builds what its name promises."""

from pathlib import Path

import pytest
import torch

from ldm.config import instantiate, load

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))

# parameters of the U-Net and of the conditioner, as counted for the published models
DIFFUSION_SIZES = {
    "ldm/celebahq.yaml": (274_056_163, 0),
    "ldm/ffhq.yaml": (274_056_163, 0),
    "ldm/lsun_bedrooms.yaml": (274_056_163, 0),
    "ldm/lsun_churches.yaml": (294_966_916, 0),
    "ldm/class2img_f4.yaml": (400_920_579, 512_512),
    "ldm/class2img_f8.yaml": (394_984_196, 512_000),
    "ldm/txt2img.yaml": (872_300_484, 581_994_042),
    "ldm/txt2img_256.yaml": (403_623_939, 186_154_682),
}
FIRST_STAGE_SIZES = {  # without loss
    "autoencoder/kl_f4.yaml": 55_312_063,
    "autoencoder/kl_f8.yaml": 83_653_863,
    "autoencoder/kl_f16.yaml": 69_610_963,
    "autoencoder/kl_f32.yaml": 103_880_131,
    "autoencoder/vq_f4.yaml": 55_322_782,
    "autoencoder/vq_f4_noattn.yaml": 53_219_486,
    "autoencoder/vq_f8.yaml": 67_717_295,
    "autoencoder/vq_f8_n256.yaml": 67_652_783,
    "autoencoder/vq_f16.yaml": 69_593_371,
}


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def build(name: str) -> torch.nn.Module:
    config = load(CONFIGS / name)
    with torch.device("meta"):
        return instantiate(config.model, "model")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_builds(name):
    assert count(build(name)) > 0


@pytest.mark.parametrize("name", DIFFUSION_SIZES)
def test_diffusion_models_have_the_published_size(name):
    model = build(name)
    assert (count(model.model), count(model.cond_stage_model)) == DIFFUSION_SIZES[name]


@pytest.mark.parametrize("name", FIRST_STAGE_SIZES)
def test_first_stages_have_the_published_size(name):
    assert count(build(name).autoencoder) == FIRST_STAGE_SIZES[name]


def test_all_published_sizes_are_of_configs_that_exist():
    assert {*DIFFUSION_SIZES, *FIRST_STAGE_SIZES} <= {*NAMES}
