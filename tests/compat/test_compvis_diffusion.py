"""The CompVis dialect: whole diffusion models, and how their conditioning is wired."""

import itertools

import pytest
from foreign_nodes import bert, kl, latent_diffusion, problem, unet

from ldm import compat
from ldm.compat import instantiate
from ldm.config import ConfigError, validate


def training_params(**params: object) -> dict:
    return compat.translate_node(latent_diffusion(**params))["params"]


def ldm_params(**params: object) -> dict:
    return training_params(**params)["model"]["params"]


IDENTITY = {"target": "torch.nn.Identity"}
CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 10}}
CONDITIONAL_UNET = unet(num_heads=1, use_spatial_transformer=True, context_dim=8)


def conditioner(**params: object) -> dict:
    return ldm_params(cond_stage_key="c", **params)["conditioner"]


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({}, "images.ImageConditioner"),
        ({"concat_mode": True}, "images.ImageConditioner"),
        ({"concat_mode": False}, "text.EmbeddingConditioner"),
        ({"conditioning_key": "concat", "concat_mode": False}, "images.ImageConditioner"),
        ({"conditioning_key": "crossattn"}, "text.EmbeddingConditioner"),
        ({"conditioning_key": "adm"}, "labels.ClassConditioner"),
        ({"conditioning_key": "hybrid"}, "base.JointConditioner"),
    ],
)
def test_how_a_conditioning_enters(given: dict, target: str) -> None:
    node = conditioner(cond_stage_config=IDENTITY, unet_config=unet(num_heads=1, num_classes=5), **given)
    assert node["target"] == f"ldm.conditioning.{target}"
    validate(node)


def test_without_conditioning_the_key_plays_no_part() -> None:
    assert "conditioner" not in ldm_params(conditioning_key="crossattn", cond_stage_key="image")


def test_class_embedder_has_its_own_key_and_the_published_null_label() -> None:
    given = {"conditioning_key": "crossattn", "cond_stage_trainable": True}
    params = conditioner(cond_stage_config=CLASSES, **given)["params"]
    assert params == {"num_classes": 10, "embed_dim": 8, "key": "class", "trainable": True}
    many = {**CLASSES, "params": {"embed_dim": 8, "n_classes": 1001, "key": "class_label"}}
    params = conditioner(cond_stage_config=many, **given)["params"]
    assert (params["null_label"], params["key"]) == (1000, "class_label")


def test_first_stage_as_conditioner_takes_a_mask_where_the_network_has_a_channel_for_it() -> None:
    given = {"cond_stage_config": "__is_first_stage__", "channels": 4}
    assert conditioner(unet_config=unet(num_heads=1) | unet(num_heads=1, in_channels=8), **given)["params"] == {
        "key": "c"
    }
    masked = conditioner(unet_config=unet(num_heads=1, in_channels=9), **given)
    assert masked["params"] == {"key": "c", "mask_key": "mask"}


def test_text_conditioners() -> None:
    given = {"conditioning_key": "crossattn", "unet_config": CONDITIONAL_UNET}
    text = conditioner(cond_stage_config=bert(), **given)["params"]
    tokenizer = {"name_or_path": "bert-base-uncased", "max_length": 77, "vocab_size": 30522}
    assert text["tokenizer"]["params"] == tokenizer
    assert (text["key"], text["dim"], text["depth"], text["trainable"]) == ("c", 8, 1, False)
    ids = bert(use_tokenizer=False, vocab_size=50, max_seq_len=5)
    tokens = ldm_params(cond_stage_config=ids, cond_stage_key="coordinates_bbox", **given)["conditioner"]
    assert tokens["target"] == "ldm.conditioning.text.TokenConditioner"
    assert tokens["params"]["null_tokens"] == [49] * 5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cond_stage_config": "__nothing__"}, "cond_stage_config: '__nothing__' is neither a node nor"),
        ({"cond_stage_config": IDENTITY, "conditioning_key": "attn"}, "conditioning_key: 'attn' is unknown; choose"),
        ({"cond_stage_config": CLASSES}, "conditioning_key: ldm.modules.encoders.modules.ClassEmbedder needs"),
        ({"cond_stage_config": "__is_first_stage__", "cond_stage_trainable": True}, "cond_stage_trainable: has to be"),
        ({"cond_stage_config": "__is_first_stage__", "conditioning_key": "adm"}, "conditioning_key: "),
        ({"num_timesteps_cond": 2}, "num_timesteps_cond: 2 is not supported"),
        ({"scale_by_std": True, "scale_factor": 0.5}, "scale_factor: is measured with scale_by_std"),
        ({"parameterization": "z"}, "parameterization: 'z' is unknown; choose one of eps, x0, v"),
        ({"beta_schedule": "linaer"}, "beta_schedule: 'linaer' is unknown"),
        ({"loss_type": "huber"}, "loss_type: 'huber' is unknown; choose one of l1, l2"),
        ({"first_stage_confg": 1}, "first_stage_confg: unknown; did you mean first_stage_config?"),
        ({"unet_config": unet(num_heads=1, widht=3)}, "unet_config.params.widht: unknown"),
        ({"first_stage_config": "vq-f4"}, "first_stage_config: must be a node with a target"),
        ({"first_stage_config": kl(n_embed=3)}, "first_stage_config.params.n_embed: unknown"),
    ],
)
def test_mistakes_in_a_latent_diffusion_model(given: dict, says: str) -> None:
    assert problem(latent_diffusion(**given)).startswith(f"m.params.{says}")


def test_training_settings() -> None:
    params = training_params(
        loss_type="l1", parameterization="x0", l_simple_weight=0.5, original_elbo_weight=0.1, use_ema=False,
        first_stage_key="jpg", learn_logvar=True, logvar_init=0.2, v_posterior=0.3, linear_start=0.1, linear_end=0.2,
        scale_factor=0.18215, monitor="val/loss", log_every_t=5, clip_denoised=True,
        scheduler_config={
            "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 1, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.2, "max_decay_steps": 9,
                       "verbosity_interval": 0},
        },
    )  # fmt: skip
    objective = {
        "loss": "l1", "simple_weight": 0.5, "elbo_weight": 0.1, "learn_logvar": True, "logvar_init": 0.2,
    }  # fmt: skip
    schedule = {"num_steps": 10, "start": 0.1, "end": 0.2, "posterior_weight": 0.3}
    assert params["objective"]["params"] == objective
    model = params["model"]["params"]
    assert model["process"] == {"target": "ldm.diffusion.discrete.DiscreteVP.linear", "params": schedule}
    assert model["prediction"]["target"] == "ldm.diffusion.prediction.Sample"
    assert (params["ema_decay"], model["image_key"], model["latent_scale"]) == (None, "jpg", 0.18215)
    multiplier = params["optimization"]["params"]["schedule"]
    assert multiplier["target"] == "ldm.training.lr_schedules.WarmUpCosine"
    assert "verbosity_interval" not in multiplier["params"]


@pytest.mark.parametrize("kind", ["linear", "sqrt_linear", "sqrt", "cosine"])
def test_beta_schedules(kind: str) -> None:
    node = ldm_params(beta_schedule=kind)["process"]
    assert node["target"].endswith(f"DiscreteVP.{kind}")
    assert instantiate(node).num_steps == 10
    given = ldm_params(beta_schedule=kind, given_betas=[0.1, 0.2, 0.3])["process"]
    assert instantiate(given).num_steps == 3


def test_the_size_of_the_latents_is_that_of_the_published_config() -> None:
    assert ldm_params(image_size=48)["latent_size"] == 48
    assert "latent_size" not in ldm_params()


def test_measured_scale() -> None:
    assert ldm_params(scale_by_std=True)["latent_scale"] == "measure"
    assert ldm_params()["latent_scale"] == 1.0


def test_pixel_diffusion_and_layouts() -> None:
    ddpm = {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": unet(num_heads=1), "timesteps": 5}}
    node = compat.translate_node(ddpm)
    assert node["params"]["model"]["params"]["autoencoder"]["target"] == "ldm.models.autoencoder.IdentityAutoencoder"
    assert "first_stage" in problem({**ddpm, "params": {**ddpm["params"], "first_stage_config": kl()}})
    layout = latent_diffusion(cond_stage_config=bert(use_tokenizer=False, vocab_size=9), conditioning_key="crossattn")
    layout["target"] = "ldm.models.diffusion.ddpm.Layout2ImgDiffusion"
    model = compat.translate_node(layout)["params"]["model"]["params"]
    assert model["conditioner"]["params"]["key"] == "coordinates_bbox"


def test_ours_inside_theirs() -> None:
    network = {"target": "torch.nn.Identity", "params": {}}
    condition = {"target": "ldm.conditioning.images.ImageConditioner", "params": {"key": "low_res"}}
    params = ldm_params(unet_config=network, cond_stage_config=condition)
    assert params["network"] == network
    assert params["conditioner"] == condition
    autoencoder = {"target": "ldm.models.autoencoder.IdentityAutoencoder", "params": {"channels": 4}}
    assert ldm_params(first_stage_config=autoencoder)["autoencoder"] == autoencoder
    theirs = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"vq_interface": True}}
    assert ldm_params(first_stage_config=theirs, channels=4)["autoencoder"] == autoencoder


def test_first_stage_of_pixels_takes_a_mask_where_the_network_has_a_channel_for_it() -> None:
    pixels = {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}
    given = {"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat", **pixels}
    for channels, extra in itertools.product((1, 3, 4), (0, 1)):
        network = unet(num_heads=1, in_channels=2 * channels + extra, out_channels=channels)
        node = conditioner(unet_config=network, channels=channels, **given)
        assert node["params"] == {"key": "c", **({"mask_key": "mask"} if extra else {})}


def test_the_prediction_of_velocities_is_translated_and_built() -> None:
    node = ldm_params(parameterization="v")["prediction"]
    assert node["target"] == "ldm.diffusion.prediction.Velocity" and instantiate(node)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"unet_config": unet(num_heads=1, use_linear_in_transformer=True)}, "use_linear_in_transformer"),
        ({"cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}}, "OpenCLIP"),
        ({"cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder"}}, "OpenCLIP"),
        ({"unet_config": unet(num_heads=1, adm_in_channels=2816)}, "adm_in_channels"),
    ],
)
def test_what_later_models_have_is_translated_or_named_without_a_false_hint(given: dict, named: str) -> None:
    node = latent_diffusion(**given)
    try:
        validate(compat.translate_node(node))
    except ConfigError as error:
        assert named in str(error) and "did you mean" not in str(error)
