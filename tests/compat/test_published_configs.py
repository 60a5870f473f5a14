"""All published configs build, unedited, what was published."""

import copy
import gzip
import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from foreign_nodes import latent_diffusion

from ldm import compat
from ldm.compat import load
from ldm.config import ConfigError

REFERENCE = Path(__file__).parents[1] / "reference"
PUBLISHED = sorted(path.stem for path in (REFERENCE / "published_configs").glob("*.json"))

VQ_F4, VQ_F4_NOATTN, VQ_F8, KL_F8, KL_F16 = 55_322_782, 53_219_486, 67_717_295, 83_653_863, 69_610_963

# name -> parameters of (U-Net, conditioner, first stage)
DIFFUSION_SIZES = {
    "models__ldm__bsr_sr": (113_622_563, 0, VQ_F4),
    "models__ldm__celeba256": (274_056_163, 0, VQ_F4),
    "models__ldm__cin256": (394_984_196, 512_000, VQ_F8),
    "models__ldm__ffhq256": (274_056_163, 0, VQ_F4),
    "models__ldm__inpainting_big": (387_245_827, VQ_F4_NOATTN, VQ_F4_NOATTN),  # conditioned by the first stage itself
    "models__ldm__layout2img-openimages256": (246_277_379, 58_858_496, VQ_F4),
    "models__ldm__lsun_beds256": (274_056_163, 0, VQ_F4),
    "models__ldm__lsun_churches256": (294_966_916, 0, KL_F8),
    "models__ldm__semantic_synthesis256": (215_229_315, 546, VQ_F4),
    "models__ldm__semantic_synthesis512": (215_229_315, 546, VQ_F4),
    "models__ldm__text2img256": (403_623_939, 186_154_682, VQ_F4),
    "configs__latent-diffusion__celebahq-ldm-vq-4": (274_056_163, 0, VQ_F4),
    "configs__latent-diffusion__cin-ldm-vq-f8": (394_984_196, 512_000, VQ_F8),
    "configs__latent-diffusion__cin256-v2": (400_920_579, 512_512, VQ_F4),
    "configs__latent-diffusion__ffhq-ldm-vq-4": (274_056_163, 0, VQ_F4),
    "configs__latent-diffusion__lsun_bedrooms-ldm-vq-4": (274_056_163, 0, VQ_F4),
    "configs__latent-diffusion__lsun_churches-ldm-kl-8": (294_966_916, 0, KL_F8),
    "configs__latent-diffusion__txt2img-1p4B-eval": (872_300_484, 581_994_042, KL_F8),
    "configs__retrieval-augmented-diffusion__768x768": (1_335_480_400, 0, KL_F16),
}

# name -> parameters of (encoder, decoder, quant_conv, post_quant_conv, codebook, discriminator)
_KL_F4 = (22_351_238, 32_960_771, 42, 12, 0, 2_765_633)
_KL_F8 = (34_163_592, 49_490_179, 72, 20, 0, 2_765_633)
_KL_F16 = (28_265_760, 41_343_875, 1_056, 272, 0, 2_765_633)
_KL_F32 = (42_614_656, 61_244_803, 16_512, 4_160, 0, 2_765_633)
FIRST_STAGE_SIZES = {
    "models__first_stage_models__kl-f4": _KL_F4,
    "models__first_stage_models__kl-f8": _KL_F8,
    "models__first_stage_models__kl-f16": _KL_F16,
    "models__first_stage_models__kl-f32": _KL_F32,
    "configs__autoencoder__autoencoder_kl_64x64x3": _KL_F4,
    "configs__autoencoder__autoencoder_kl_32x32x4": _KL_F8,
    "configs__autoencoder__autoencoder_kl_16x16x16": _KL_F16,
    "configs__autoencoder__autoencoder_kl_8x8x64": _KL_F32,
    "models__first_stage_models__vq-f4": (22_337_411, 32_960_771, 12, 12, 24_576, 2_765_633),
    "models__first_stage_models__vq-f4-noattn": (21_285_763, 31_909_123, 12, 12, 24_576, 2_765_633),
    "models__first_stage_models__vq-f8": (27_397_764, 40_253_955, 20, 20, 65_536, 663_361),
    "models__first_stage_models__vq-f8-n256": (27_397_764, 40_253_955, 20, 20, 1_024, 2_765_633),
    "models__first_stage_models__vq-f16": (28_155_144, 41_307_011, 72, 72, 131_072, 663_361),
}


@cache
def state_dicts() -> dict[str, dict[str, list]]:
    """Read the published state dicts: config -> name -> [shape, dtype]."""
    with gzip.open(REFERENCE / "state_dicts.json.gz", "rt") as file:
        return json.load(file)


def published(name: str) -> Path:
    return REFERENCE / "published_configs" / f"{name}.json"


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return compat.instantiate(json.loads(published(name).read_text())["model"], "model")


def test_the_tables_hold_every_published_config() -> None:
    assert sorted([*DIFFUSION_SIZES, *FIRST_STAGE_SIZES]) == PUBLISHED == sorted(state_dicts())
    assert len(PUBLISHED) == 32


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_builds_what_was_published(name: str) -> None:
    training = build(name)
    model = training.model
    state = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in training.state_dict().items()
    }
    want = state_dicts()[name]
    assert state.keys() == want.keys()
    assert state == want
    if name in DIFFUSION_SIZES:
        parts = (model.model.diffusion_model, model.cond_stage_model, model.first_stage_model)
        assert tuple(map(count, parts)) == DIFFUSION_SIZES[name]
    else:
        parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv, model.quantize)
        assert (*map(count, parts), count(training.loss.discriminator)) == FIRST_STAGE_SIZES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_translation_is_pure_and_leaves_what_is_ours(name: str) -> None:
    config = json.loads(published(name).read_text())
    before = copy.deepcopy(config)
    translated = compat.translate(config)
    assert config == before
    assert compat.translate(translated) == translated
    assert translated.keys() == {*config.keys(), "training"}
    assert '"main.' not in json.dumps(translated)
    assert translated["training"]["base_learning_rate"] == config["model"]["base_learning_rate"]


def test_weights_of_the_unet_alone() -> None:
    node = compat.translate_node(
        latent_diffusion(ckpt_path="a.ckpt", ignore_keys=["model.diffusion_model.out"], load_only_unet=True)
    )
    assert node["checkpoint"] == "a.ckpt"
    ignored = tuple(node["ignore_keys"])
    assert "model.diffusion_model.out" in ignored
    names = state_dicts()["models__ldm__lsun_churches256"]
    kept = {name for name in names if not name.startswith(ignored)}
    assert kept and all(name.startswith(("model.", "model_ema.")) for name in kept)
    assert "checkpoint" not in compat.translate_node(latent_diffusion(load_only_unet=True))


def test_a_mistake_in_a_published_file_is_named_in_the_words_of_that_file(tmp_path: Path) -> None:
    config = json.loads(published("models__ldm__celeba256").read_text())
    del config["data"]
    config["model"]["params"]["unet_config"]["params"]["num_head"] = 4
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: model.params.unet_config.params.num_head: unknown; did you mean num_heads?"


def test_an_override_of_a_published_config_is_written_in_its_words(caplog) -> None:
    caplog.set_level(logging.ERROR)
    heads = ["model.params.unet_config.params.num_heads=1", "model.params.unet_config.params.num_head_channels=-1"]
    config = load(published("models__ldm__cin256"), heads)
    assert config.model.params.network.params.num_heads == 1
    with pytest.raises(ConfigError, match="command line: model.params.network: "):
        load(published("models__ldm__cin256"), ["model.params.network.params.num_heads=1"])
