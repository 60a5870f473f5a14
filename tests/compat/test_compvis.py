"""The CompVis dialect, part by part: U-Net, first stages, data, losses."""

import pytest
from foreign_nodes import DDCONFIG, NO_LOSS, UNET, kl, problem, unet, vq

from ldm import compat
from ldm.compat import instantiate
from ldm.config import ConfigError, validate


def unet_params(**params: object) -> dict:
    return compat.translate_node(unet(**params))["params"]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"num_heads": 4}, {"num_heads": 4}),
        ({"num_heads": 4, "num_head_channels": -1}, {"num_heads": 4}),
        ({"num_head_channels": 16}, {"num_head_channels": 16}),
        ({"num_heads": 4, "num_head_channels": 16}, {"num_head_channels": 16}),
        ({"num_heads": 4, "legacy": False}, {"num_heads": 4}),
        ({"num_heads": 1, "use_spatial_transformer": True, "context_dim": 8}, {"num_heads": 1, "context_dim": 8}),
    ],
)
def test_heads(given: dict, want: dict) -> None:
    got = unet_params(**given)
    heads = {key: got[key] for key in ("num_heads", "num_head_channels", "context_dim", "options") if key in got}
    assert heads == want


@pytest.mark.parametrize(
    ("given", "honoured"),
    [
        ({}, True),
        ({"legacy": True}, True),
        ({"legacy": False}, False),
        ({"num_head_channels": 16}, False),
        ({"use_spatial_transformer": True, "context_dim": 8}, False),
    ],
)
def test_heads_of_the_decoder(given: dict, honoured: bool) -> None:
    options = unet_params(num_heads=4, num_heads_upsample=2, **given).get("options", {"params": {}})
    assert options["params"] == ({"num_heads_upsample": 2} if honoured else {})


def test_a_warning_about_the_heads_of_the_first_release(caplog) -> None:
    unet_params(num_head_channels=16)
    unet_params(num_heads=1, use_spatial_transformer=True, context_dim=8)
    assert not caplog.text
    unet_params(num_head_channels=16, use_spatial_transformer=True, context_dim=8)
    assert "trained with one head" in caplog.text and "cin256" in caplog.text


def test_options() -> None:
    given = {"use_checkpoint": True, "use_new_attention_order": True, "use_scale_shift_norm": True, "n_embed": 7}
    params = unet_params(num_heads=1, **given)
    assert params["codebook_size"] == 7
    want = {"checkpoint": True, "qkv_order": "new", "scale_shift_norm": True}
    assert params["options"] == {"target": "ldm.networks.unet.UNetOptions", "params": want}


def test_options_at_values_that_change_nothing() -> None:
    idle = {
        "num_res_blocks": [1, 1], "disable_self_attentions": [False, False], "num_attention_blocks": [1, 1],
        "disable_middle_self_attn": False, "transformer_depth_middle": None, "adm_in_channels": None, "use_fp16": True,
        "spatial_transformer_attn_type": "softmax-xformers", "use_linear_in_transformer": False,
    }  # fmt: skip
    plain, full = unet_params(num_heads=1), unet_params(num_heads=1, **idle)
    assert full.pop("options")["params"] == {"linear_projections": False}
    assert full == plain


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (unet(), "m.params: set num_heads or num_head_channels"),
        (unet(num_head=3), "m.params: set num_heads"),
        (unet(num_heads=1, modelchannels=3), "m.params.modelchannels: unknown; did you mean model_channels?"),
        (unet(num_heads=1, context_dim=3), "m.params.context_dim: goes with use_spatial_transformer"),
        (unet(num_heads=1, use_spatial_transformer=True), "m.params.context_dim: goes with use_spatial_transformer"),
        (unet(num_heads=1, num_res_blocks=[1, 2]), "m.params.num_res_blocks: [1, 2] differ between levels"),
        (unet(num_heads=1, disable_self_attentions=[False, True]), "m.params.disable_self_attentions: [False, True]"),
        (unet(num_heads=1, num_attention_blocks=[1, 0]), "m.params.num_attention_blocks: [1, 0] is not supported"),
        (unet(num_heads=1, transformer_depth_middle=3), "m.params.transformer_depth_middle: 3 is not supported"),
        (unet(num_heads=1, num_classes="continuous"), "m.params.num_classes: 'continuous' is not supported"),
        (unet(num_heads=1, num_classes="sequential"), "m.params.adm_in_channels: missing"),
        (unet(num_heads=1, spatial_transformer_attn_type="linear"), "m.params.spatial_transformer_attn_type: 'linear'"),
        ({"target": UNET, "params": {"in_channels": 3}}, "m.params: out_channels, model_channels, num_res_blocks"),
        ({"target": UNET + "l"}, f"m.target: {UNET}l is unknown; did you mean {UNET}?"),
        ({"target": "main.Nothing"}, "m.target: main.Nothing is unknown"),
    ],
)
def test_mistakes_in_a_foreign_config_are_named_in_its_own_words(node: dict, says: str) -> None:
    assert problem(node).startswith(says)


@pytest.mark.parametrize(
    "target",
    [
        "ldm.models.diffusion.classifier.NoisyLatentImageClassifier",
        "ldm.models.diffusion.ddim.DDIMSampler",
        "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder",
        "ldm.modules.diffusionmodules.model.FirstStagePostProcessor",
        "ldm.modules.diffusionmodules.model.Upsampler",
        "ldm.modules.diffusionmodules.model.Resize",
        "taming.models.vqgan.GumbelVQ",
    ],
)
def test_what_never_ran_or_is_not_here_says_so(target: str) -> None:
    assert problem({"target": target, "params": {"x": 1}}).startswith(f"m.target: {target} is not available: ")


def test_an_autoencoder_on_its_own_is_one_to_be_trained() -> None:
    node = compat.translate_node(
        vq("VQModel", use_ema=True, lr_g_factor=2.0, batch_resize_range=[128, 256], image_key="x")
    )
    assert node["target"] == "ldm.training.autoencoder.AutoencoderTraining"
    params = node["params"]
    assert params["model"]["target"] == "ldm.models.autoencoder.Autoencoder"
    assert params["loss"] == NO_LOSS
    assert (params["ema_decay"], params["generator_lr_factor"]) == (0.9999, 2.0)
    assert (params["resize_range"], params["image_key"]) == ([128, 256], "x")
    validate(node)


@pytest.mark.parametrize("module", ["ldm.modules.losses.contperceptual", "taming.modules.losses.vqperceptual"])
def test_a_dummy_loss_is_none(module: str) -> None:
    node = compat.translate_node(kl(lossconfig={"target": f"{module}.DummyLoss"}))
    assert node["params"]["loss"]["target"] == "torch.nn.Identity"


def test_weights_and_what_to_ignore_move_to_the_node() -> None:
    node = compat.translate_node(kl(ckpt_path="a.ckpt", ignore_keys=["loss"]))
    assert (node["checkpoint"], node["ignore_keys"]) == ("a.ckpt", ["loss"])
    path = "configs/first_stage_models/vq-f4/model.yaml"
    assert compat.translate_node(kl(ckpt_path=path))["checkpoint"] == "models/first_stage_models/vq-f4/model.ckpt"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (vq(ddconfig=DDCONFIG), "m.params.ddconfig.double_z: set it to false"),
        (kl(ddconfig={**DDCONFIG, "double_z": False}), "m.params.ddconfig.double_z: set it to true"),
        (kl(ddconfig={**DDCONFIG, "chmult": [1]}), "m.params.ddconfig.chmult: unknown; did you mean ch_mult?"),
        (kl(ddconfig={**DDCONFIG, "attn_type": "x"}), "m.params.ddconfig.attn_type: 'x' is unknown; choose one of van"),
        (kl(embeddim=3), "m.params.embeddim: unknown; did you mean embed_dim?"),
        ({"target": "ldm.models.autoencoder.AutoencoderKL"}, "m.params: ddconfig missing"),
    ],
)
def test_mistakes_in_a_first_stage(node: dict, says: str) -> None:
    assert problem(node).startswith(says)


def data(**params: object) -> dict:
    return {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "wrap": True, **params}}


def test_data_modules_keep_what_matters() -> None:
    train = {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"config": {"size": 32}, "data_root": "here"}}
    given = {"num_workers": 3, "use_worker_init_fn": True, "shuffle_val_dataloader": True}
    node = compat.translate_node(data(train=train, **given))
    folder = node["params"].pop("train")
    assert node == {"target": "ldm.data.core.module.DataModule", "params": {"batch_size": 2, "num_workers": 3}}
    assert folder["target"] == "ldm.data.readers.folders.ImageFolder"
    want = {"root": "here/ILSVRC2012_train/data", "size": 32, "class_folders": True, "crop": "random"}
    assert folder["params"] == {**want, "interpolation": "bilinear"}
    validate(folder)
    assert problem(data(batchsize=3)) == "m.params.batchsize: unknown; did you mean batch_size?"
    train["params"]["config"]["sice"] = 3
    assert problem(data(train=train)) == "m.params.train.params.config.sice: unknown; did you mean size?"


@pytest.mark.parametrize(
    ("target", "params", "want"),
    [
        ("taming.data.faceshq.FFHQTrain", {"size": 8}, {"root": "data/ffhq", "size": 8, "split": "train"}),
        (
            "ldm.data.lsun.LSUNCatsValidation",
            {"size": 8, "interpolation": "linear"},
            {
                "root": "data/lsun/cats", "list_file": "data/lsun/cat_val.txt", "size": 8, "flip": 0.0,
                "interpolation": "bilinear",
            },
        ),
        (
            "ldm.data.openimages.FullOpenImagesTrain",
            {"size": 9, "crop_size": 8},
            {"root": "data/openimages/train", "size": 8, "resize": 9, "crop": "random"},
        ),
        (
            "taming.data.custom.CustomTest",
            {"size": 8, "test_images_list_file": "a.txt"},
            {"root": ".", "size": 8, "list_file": "a.txt"},
        ),
    ],
)  # fmt: skip
def test_data_sets_that_are_folders_of_pictures(target: str, params: dict, want: dict) -> None:
    node = compat.translate_node({"target": target, "params": params})
    assert node == {"target": "ldm.data.readers.folders.ImageFolder", "params": want}
    validate(node)


@pytest.mark.parametrize("name", ["openimages.OpenImagesBBoxTrain", "landscapes.RFWTrain", "previews.a.PreviewsTrain"])
def test_a_data_set_that_is_not_here_is_missed_when_the_data_is_built(name: str) -> None:
    node = data(train={"target": f"ldm.data.{name}", "params": {"size": 8}})
    validate(compat.translate_node(node))
    with pytest.raises(ConfigError, match=f"data.params.train: .*ldm.data.{name} "):
        instantiate(node, "data")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("objects_bbox.ObjectsBoundingBoxConditionalBuilder", "BoxTokenizer"),
        ("objects_center_points.ObjectsCenterPointsConditionalBuilder", "CentrePointTokenizer"),
    ],
)
def test_layout_tokens(theirs: str, ours: str) -> None:
    params = {"no_object_classes": 5, "no_max_objects": 3, "no_tokens": 64, "encode_crop": False}
    flags = {"use_group_parameter": True, "use_additional_parameters": True}
    tokenizer = instantiate({"target": f"taming.data.conditional_builder.{theirs}", "params": params | flags})
    assert type(tokenizer).__name__ == ours
    assert (tokenizer.num_classes, tokenizer.max_objects, tokenizer.vocab_size) == (5, 3, 64)
    assert (tokenizer.encode_crop, tokenizer.use_group, tokenizer.use_attributes) == (False, True, True)


def test_adversarial_losses() -> None:
    given = {"disc_start": 5, "disc_weight": 0.5, "disc_factor": 0.9, "disc_num_layers": 2, "pixelloss_weight": 1.0}
    theirs = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {**given, "kl_weight": 1e-6}}
    loss = compat.translate_node(theirs)
    assert loss["target"] == "ldm.autoencoder.losses.KLLoss"
    assert (loss["params"]["disc_start"], loss["params"]["kl_weight"]) == (5, 1e-6)
    assert loss["params"]["discriminator"]["params"] == {"in_channels": 3, "width": 64, "num_layers": 2}
    assert loss["params"]["adversary"]["params"] == {"weight": 0.5, "factor": 0.9, "loss": "hinge"}
    validate(loss)
    for home in ("ldm", "taming"):
        theirs = {"target": f"{home}.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": given}
        theirs["params"] |= {"disc_ndf": 16, "codebook_weight": 0.7, "disc_loss": "vanilla"}
        loss = compat.translate_node(theirs)
        assert loss["target"] == "ldm.autoencoder.losses.VQLoss"
        assert loss["params"]["discriminator"]["params"]["width"] == 16
        assert (loss["params"]["codebook_weight"], loss["params"]["adversary"]["params"]["loss"]) == (0.7, "vanilla")
        validate(loss)
    theirs["params"]["disc_loss"] = "wasserstein"
    assert problem(theirs).startswith("m.params.disc_loss: 'wasserstein' is unknown; choose one of hinge, vanilla")


@pytest.mark.parametrize("target", sorted(set(compat.TABLE) - {"torch.nn.Identity"}))
def test_every_translation_reports_what_it_does_not_know(target: str) -> None:
    assert problem({"target": target, "params": {"no_such_parameter": 1}}).startswith("m.")


@pytest.mark.parametrize(
    ("callbacks", "key"),
    [
        ({"image_logger": {"target": "main.ImageLogger", "params": {"batch_frequenzy": 5}}}, "batch_frequenzy"),
        ({"x": {"target": "main.ImageLogger", "params": {"max_pictures": 5}}}, "max_pictures"),
        ({"image_logger": {"target": "main.ImageLogger", "params": [1]}}, "params"),
        ({"metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_stepz": 5}}}, "every_n_train_stepz"),
        ({"metrics_over_trainsteps_checkpoint": {"params": 3}}, "params"),
    ],
)
def test_no_key_of_a_foreign_callback_is_dropped_in_silence(callbacks: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"lightning.callbacks\..*{key}"):
        compat.translate({"lightning": {"callbacks": callbacks}})


@pytest.mark.parametrize("name", ["adm_model_channels", "use_linear_transformer", "out_mult", "context_dims_of"])
def test_a_hint_in_a_foreign_config_needs_a_slip(name: str) -> None:
    assert "did you mean" not in problem(unet(num_heads=1, **{name: 3}))
