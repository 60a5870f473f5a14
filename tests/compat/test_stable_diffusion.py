"""Stable Diffusion 1, 2 and XL as they were published: their configs, and the names in their single files."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_models as models
import numpy as np
import pytest
import tiny
import torch
import yaml
from foreign_nodes import kl, latent_diffusion, problem, unet
from PIL import Image
from torch import Tensor, nn

from ldm import compat, config
from ldm.cli import inpaint
from ldm.cli.train import main as train
from ldm.compat import single_files
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource, load_model
from ldm.weights import folders
from ldm.weights.load import load_into

FAMILY, WIDTH = models.FAMILY, models.TEXT_WIDTH
HEADS, LAYERS, WORDS = 2, 2, 10  # of the text models
ENCODERS = "ldm.modules.encoders.modules"
LDM = "ldm.models.diffusion.ddpm"


@pytest.fixture(params=FAMILY)
def family(request, clip_folder, open_clip_folder) -> tuple[str, models.Config]:
    """Give each member of the family as section `model`, a tiny one."""
    return request.param, FAMILY[request.param](clip_folder, open_clip_folder)


def published(section: models.Config, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model under the names of published files, with what else these hold."""
    state = model.state_dict()
    state = folders.to_ours(state, single_files.published(state, section))
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model."):
        if f"{prefix}ln_final.weight" in state:
            blocks = {key: value for key, value in state.items() if f"{prefix}transformer.resblocks.1." in key}
            state |= {
                key.replace("resblocks.1.", "resblocks.3."): torch.zeros_like(value) for key, value in blocks.items()
            }
            state |= {f"{prefix}logit_scale": torch.tensor(1.0), f"{prefix}attn_mask": torch.zeros(8, 8)}
            state.setdefault(f"{prefix}text_projection", torch.zeros(WIDTH, WIDTH))
    return state


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def filled(section: models.Config, state: dict[str, Tensor]) -> nn.Module:
    model = config.instantiate(section).eval()
    load_into(model, state)
    return model


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_published_file_fills_the_model_and_comes_back(family):
    name, section = family
    model = models.build(section)
    state = published(section, model)
    text_names = {key for key in state if key.startswith(("cond_stage_model.", "conditioner."))}
    beginnings = {
        "sd1": "cond_stage_model.transformer.text_model.",
        "sd2": "cond_stage_model.model.",
        "inpainting": "cond_stage_model.transformer.text_model.",
        "sdxl": "conditioner.embedders.",
    }
    assert text_names and all(key.startswith(beginnings[name]) for key in text_names)
    assert same(filled(section, state), model)
    assert same(filled(section, model.state_dict()), model)


def without_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "." in name}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    shadows = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value
        for name, value in state.items()
        if name.startswith("model.")
    }
    return {**{name: value + 1 if name.startswith("model.") else value for name, value in state.items()}, **shadows}


WRITINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "without the tables": without_tables,
    "NovelAI's names": lambda state: {name.replace("text_model.", ""): value for name, value in state.items()},
    "position_ids": lambda state: (
        state | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(8)}
    ),
    "what CLIP's loss needs": lambda state: state | {"cond_stage_model.logit_scale": torch.tensor(1.0)},
    "raw and averaged": averaged,
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_what_communities_made_of_files_is_read(writing, clip_folder, open_clip_folder, tmp_path):
    section = models.sd1(clip_folder, open_clip_folder)
    model = models.build(section)
    file, yaml_file = tmp_path / "model.ckpt", tmp_path / "config.yaml"
    torch.save({"state_dict": WRITINGS[writing](model.state_dict())}, file)
    yaml_file.write_text(yaml.safe_dump({"model": section}))
    assert same(load_model(ModelSource(config=yaml_file, checkpoint=file)).model, model)


def test_half_precision_is_read(family):
    name, section = family
    model = models.build(section)
    loaded = filled(section, {key: value.half() for key, value in without_tables(published(section, model)).items()})
    expected = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.allclose(value, expected[key], atol=1e-3, rtol=1e-3)


def test_a_file_of_another_member_of_the_family_is_told(clip_folder, open_clip_folder):
    built = {name: (make(clip_folder, open_clip_folder)) for name, make in FAMILY.items()}
    states = {name: published(section, models.build(section)) for name, section in built.items()}
    for name, other, said in (
        ("sd1", "sd2", "Stable Diffusion 2"),
        ("sd2", "sdxl", "Stable Diffusion XL"),
        ("inpainting", "sd1", "in_channels"),
        ("sdxl", "inpainting", "missing"),
    ):
        with pytest.raises(UserError) as refused:
            filled(built[name], states[other])
        message = str(refused.value)
        assert len(message) <= 300 and "does not fit" in message and (said in message or said == "in_channels")


# ------------------------------------------------------------------------------------------------------- text encoders


class Block(nn.Module):
    """A layer of OpenCLIP's text model, by torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h, hidden = self.ln_1(x), torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=hidden)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """OpenCLIP's text model: tokens (B, L) -> all layers (B, L, D), and the vector of the last token (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(8, WIDTH))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block() for _ in range(LAYERS + 1))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        layers = [self.token_embedding(ids) + self.positional_embedding]
        for block in self.transformer.resblocks:
            layers.append(block(layers[-1]))
        ends = (ids == 1).int().argmax(dim=1)
        return layers, self.ln_final(layers[-1])[range(len(ids)), ends] @ self.text_projection


@torch.no_grad()
def test_open_clip_is_the_same_network_under_other_names(clip_folder, open_clip_folder):
    torch.manual_seed(0)
    theirs = OpenClip().eval()
    texts = ["a red circle", "two green triangles and"]
    for name, key in (("sd2", "cond_stage_model.model."), ("sdxl", "conditioner.embedders.1.model.")):
        section = FAMILY[name](clip_folder, open_clip_folder)
        state = published(section, models.build(section))
        state |= {f"{key}{part}": value for part, value in theirs.state_dict().items()}
        conditioner = filled(section, state).cond_stage_model
        part = conditioner if name == "sd2" else conditioner.text_2
        ids = part.tokenizer(texts)
        assert ids[0].tolist()[-2:] == [0, 0]  # filled up with 0, not with the end
        layers, vector = theirs(ids)
        given = part({"caption": texts})
        expected = theirs.ln_final(layers[-2]) if name == "sd2" else layers[-2]
        torch.testing.assert_close(given.context, expected, atol=5e-6, rtol=0)
        if name == "sdxl":
            torch.testing.assert_close(given.vector, vector, atol=5e-6, rtol=0)


def test_published_weights_of_the_version_take_their_place(open_clip_folder):
    from transformers import CLIPTextModelWithProjection

    published = CLIPTextModelWithProjection.from_pretrained(open_clip_folder)
    for layer, pooled in (("penultimate", None), ("hidden", "projected"), ("last", "token")):
        part = config.instantiate(models.text(open_clip_folder, layer=layer, pooled=pooled))
        part({"caption": ["red"]})
        own = part.transformer.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in published.state_dict().items() if name in own)
        assert ("text_projection.weight" in own) is (pooled == "projected")


# -------------------------------------------------------------------------------------------------------------- samples


@torch.no_grad()
def test_each_of_the_family_samples(family):
    name, section = family
    model = models.build(section)
    prompts = ["a red circle", "two green triangles"]
    conditions = {"caption": prompts}
    if name == "inpainting":
        images, masks = torch.rand(2, 3, models.SIDE, models.SIDE), torch.ones(2, 1, models.SIDE, models.SIDE)
        conditions |= {"masked_image": images, "mask": masks}
    given = conditions if name == "inpainting" else prompts
    samples = model.sample(given, steps=2, guidance=2.0, size=(models.SIDE, models.SIDE))
    negative = model.sample(
        given, steps=2, guidance=2.0, size=(models.SIDE, models.SIDE), negative={"caption": ["blue"] * 2}
    )
    assert samples.shape == (2, 3, models.SIDE, models.SIDE) and torch.isfinite(samples).all()
    assert not torch.equal(samples, negative)


@torch.no_grad()
def test_guidance_goes_away_from_the_text_alone(clip_folder, open_clip_folder):
    """Sizes are those of the image on both sides, and 'no text' is zeros, as Stable Diffusion XL was trained."""
    conditioner = models.build(models.sdxl(clip_folder, open_clip_folder)).cond_stage_model
    batch = {
        "caption": ["red", "blue"],
        "original_size": [(64, 32)] * 2,
        "crop": [(0, 0)] * 2,
        "target_size": [(64, 32)] * 2,
    }
    condition, away = conditioner(batch), conditioner.unconditional(2, batch)
    assert condition.context.shape == (2, 8, 2 * WIDTH) and condition.vector.shape == (2, WIDTH + 24)
    assert not away.context.any() and not away.vector[:, :WIDTH].any()
    assert torch.equal(away.vector[:, WIDTH:], condition.vector[:, WIDTH:])
    dropped = conditioner(batch, torch.tensor([True, False]))
    assert not dropped.context[0].any() and torch.equal(dropped.context[1], condition.context[1])
    image = {"caption": ["red", "blue"], "image": torch.zeros(2, 3, 64, 32)}
    assert torch.equal(conditioner(image).vector, condition.vector)


def test_each_of_the_family_goes_on_from_its_file(family, tmp_path):
    """The training of a published file: every weight of the network gets a gradient, the text model none."""
    _, section = family
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": published(section, models.build(section))}, file)
    node = tiny.node("training.latent_diffusion.DiffusionTraining", model=section, ema_decay=None)
    training = config.instantiate({**node, "checkpoint": str(file)})
    batch = {"image": torch.rand(2, 3, models.SIDE, models.SIDE) * 2 - 1, "caption": ["red", "blue"]}
    batch |= {"masked_image": batch["image"], "mask": torch.ones(2, 1, models.SIDE, models.SIDE)}
    model = training.model
    z = model.latents(batch)
    conditioning = model.condition(batch, model.cond_stage_model.draw_drop(2))
    model.loss(z, conditioning, torch.tensor([3, 50]), torch.randn_like(z), training.objective).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.model.parameters())
    assert not any(parameter.requires_grad for parameter in model.cond_stage_model.parameters())


def test_holes_are_filled_by_a_text(clip_folder, open_clip_folder, tmp_path, capsys):
    section = models.inpainting(clip_folder, open_clip_folder)
    run = models.build(section).save_pretrained(tmp_path / "model.safetensors", section)
    pixels = torch.randint(0, 256, (3, models.SIDE, 2 * models.SIDE), dtype=torch.uint8)
    hole = torch.zeros(models.SIDE, 2 * models.SIDE, dtype=torch.uint8)
    hole[4:12, 4:12] = 255
    for name, content in (("a.png", pixels.permute(1, 2, 0)), ("m.png", hole)):
        Image.fromarray(content.numpy()).save(tmp_path / name)
    words = ["--run", str(run), "--image", str(tmp_path / "a.png"), "--mask", str(tmp_path / "m.png"), "--steps", "2"]
    words += ["--device", "cpu", "--scale", "50", "--skip_grid"]
    drawn = []
    for number, prompt in enumerate(
        (["a red circle"], ["two green triangles"], ["a red circle", "--negative", "blue"])
    ):
        out = tmp_path / str(number)
        assert inpaint.main([*words, "--outdir", str(out), "--prompt", *prompt]) == 0
        drawn.append(torch.from_numpy(np.array(Image.open(next(out.rglob("a*.png"))))).permute(2, 0, 1))
        assert torch.equal(drawn[-1][:, hole == 0], pixels[:, hole == 0])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(SystemExit):
        inpaint.main([*words, "--outdir", str(tmp_path / "none")])
    assert "--prompt" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- configs


def stage(kind: str, **params: Any) -> dict[str, Any]:
    return {"target": f"{ENCODERS}.{kind}", "params": params}


def v1(**params: Any) -> dict[str, Any]:
    network = unet(num_heads=2, use_spatial_transformer=True, context_dim=WIDTH, legacy=False, **params.pop("unet", {}))
    known = {
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "conditioning_key": "crossattn",
        "image_size": 8,
        "scale_factor": 0.18215,
        "use_ema": False,
        "channels": 4,
        "num_timesteps_cond": 1,
        "timesteps": 100,
    }
    return latent_diffusion(
        unet_config=network, **{**known, "cond_stage_config": stage("FrozenCLIPEmbedder"), **params}
    )


def parts(node: dict[str, Any]) -> dict[str, Any]:
    return compat.translate_node(node)["params"]["model"]["params"]


def test_stable_diffusion_2_is_translated():
    open_clip = stage("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate")
    options = {"use_fp16": True, "use_linear_in_transformer": True}
    node = v1(parameterization="v", cond_stage_config=open_clip, unet=options)
    model = parts(node)
    assert model["prediction"]["target"].endswith("Velocity")
    assert model["network"]["params"]["options"]["params"]["linear_projections"] is True
    params = model["conditioner"]["params"]
    assert (params["layer"], params["pad_id"], params["key"]) == ("penultimate", 0, "txt")
    assert params["version"] == "laion/CLIP-ViT-H-14-laion2B-s32B-b79k"
    translated = compat.translate({"model": node})
    assert translated["lightning"]["trainer"]["precision"] == "16-mixed"
    own = compat.translate({"model": node, "lightning": {"trainer": {"precision": 32}}})
    assert own["lightning"]["trainer"]["precision"] == 32


def test_no_warning_of_old_weights_for_stable_diffusion_2(caplog):
    options = {"use_linear_in_transformer": True, "num_head_channels": 16, "num_heads": -1}
    network = {**unet(use_spatial_transformer=True, context_dim=WIDTH, legacy=False, **options)}
    del network["params"]["num_heads"]
    compat.translate_node(network)
    assert not caplog.text


def test_inpainting_with_a_text_is_translated():
    node = v1(unet={"in_channels": 9}, conditioning_key="hybrid", finetune_keys=None)
    node["target"] = f"{LDM}.LatentInpaintDiffusion"
    conditioner = parts(node)["conditioner"]["params"]
    assert conditioner["inpainting"]["params"] == {"key": "masked_image", "latent_scale": 0.18215}
    assert conditioner["text"]["params"]["key"] == "txt"
    node["params"]["conditioning_key"] = "concat"
    assert parts(node)["conditioner"]["target"].endswith("InpaintingConditioner")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"cond_stage_config": stage("FrozenCLIPEmbedder", layer="pooled")},
            "cond_stage_config.params.layer: 'pooled'",
        ),
        ({"cond_stage_config": stage("FrozenOpenCLIPEmbedder", arch="ViT-B-32")}, "cond_stage_config.params.arch"),
        ({"cond_stage_config": stage("FrozenOpenCLIPEmbedder", layer="pooled")}, "cond_stage_config.params.layer"),
        (
            {"cond_stage_config": stage("FrozenOpenCLIPEmbedder", lyaer="last")},
            "cond_stage_config.params.lyaer: unknown",
        ),
        ({"ucg_training": {"txt": {"p": 0.1}}}, "ucg_training: {'txt': {'p': 0.1}} is not supported"),
        (
            {
                "first_stage_config": kl(
                    ddconfig={**kl()["params"]["ddconfig"], "attn_type": "memory-efficient-cross-attn"}
                )
            },
            "first_stage_config.params.ddconfig.attn_type: 'memory",
        ),
    ],
)
def test_what_is_not_supported_is_refused_under_the_users_own_name(given, says):
    message = problem(v1(**given))
    assert message.startswith(f"m.params.{says}") and len(message) <= 300


def test_an_inference_config_without_data_is_shown_and_sampled(clip_folder, tmp_path, capsys, caplog):
    """As `v1-inference.yaml` is published: there is neither a section data nor lightning."""
    caplog.set_level(logging.ERROR)
    node = {
        **v1(cond_stage_config=stage("FrozenCLIPEmbedder", version=str(clip_folder), max_length=8)),
        "base_learning_rate": 1e-4,
    }
    file, weights = tmp_path / "v1-inference.yaml", tmp_path / "model.ckpt"
    file.write_text(yaml.safe_dump({"model": node}))
    assert train(["--base", str(file), "--dry-run", "--accelerator", "cpu", "-l", str(tmp_path)]) == 0
    assert "parameters" in capsys.readouterr().out
    section = compat.translate({"model": node})["model"]
    torch.save({"state_dict": without_tables(models.build(section).state_dict())}, weights)
    model = load_model(ModelSource(config=file, checkpoint=weights)).model
    assert model.sample(["a red circle"], steps=2).shape == (1, 3, 16, 16)


# ------------------------------------------------------------------------------------------------------------------ sgm

SGM = "sgm.modules.diffusionmodules"


def sgm(*embedders: dict[str, Any], network: dict[str, Any], **params: Any) -> dict[str, Any]:
    discretization = {"target": f"{SGM}.discretizer.LegacyDDPMDiscretization"}
    scaling = {"target": f"{SGM}.denoiser_scaling.EpsScaling"}
    denoiser = {
        "target": f"{SGM}.denoiser.DiscreteDenoiser",
        "params": {"num_idx": 1000, "scaling_config": scaling, "discretization_config": discretization},
    }
    shape = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
    known = {
        **shape,
        "attention_resolutions": [2],
        "num_head_channels": 16,
        "spatial_transformer_attn_type": "softmax-xformers",
    }
    ddconfig = {**kl()["params"]["ddconfig"], "attn_type": "vanilla-xformers"}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.13025,
            "disable_first_stage_autocast": True,
            "denoiser_config": denoiser,
            "network_config": {"target": f"{SGM}.openaimodel.UNetModel", "params": {**known, **network}},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": list(embedders)},
            },
            "first_stage_config": {**kl(ddconfig=ddconfig), "target": "sgm.models.autoencoder.AutoencoderKL"},
            **params,
        },
    }


def embedder(kind: str, key: str, beside: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    return {"input_key": key, "target": f"sgm.modules.encoders.modules.{kind}", "params": params, **(beside or {})}


def size_of(key: str) -> dict[str, Any]:
    return embedder("ConcatTimestepEmbedderND", key, outdim=4)


XL = {
    "num_classes": "sequential",
    "adm_in_channels": WIDTH + 24,
    "context_dim": 2 * WIDTH,
    "transformer_depth": [1, 2],
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
}


def sgm_xl() -> dict[str, Any]:
    return sgm(
        embedder("FrozenCLIPEmbedder", "txt", {"is_trainable": False}, layer="hidden", layer_idx=11),
        embedder(
            "FrozenOpenCLIPEmbedder2",
            "txt",
            {"ucg_rate": 0.1},
            arch="ViT-bigG-14",
            version="laion2b_s39b_b160k",
            freeze=True,
            layer="penultimate",
            always_return_pooled=True,
            legacy=False,
        ),
        *map(size_of, ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")),
        network=XL,
    )


def test_the_xl_config_of_sgm_is_ours():
    model = parts(sgm_xl())
    assert model["latent_scale"] == 0.13025
    assert model["process"]["params"] == {"num_steps": 1000, "start": 0.00085, "end": 0.012}
    network = model["network"]["params"]
    assert (network["vector_dim"], network["transformer_depth"], network["context_dim"]) == (
        WIDTH + 24,
        [1, 2],
        2 * WIDTH,
    )
    first, second, *sizes = (value for value in model["conditioner"]["params"].values() if isinstance(value, dict))
    assert (first["params"]["layer"], second["params"]["layer"], second["params"]["pooled"]) == (
        "hidden",
        "hidden",
        "projected",
    )
    assert [part["params"].get("is_corner", False) for part in sizes] == [False, True, False]
    config.validate(compat.translate_node(sgm_xl()))


def test_the_plain_configs_of_sgm_build():
    size, corner = size_of("original_size_as_tuple"), size_of("crop_coords_top_left")
    classes = embedder(
        "ClassEmbedder",
        "cls",
        {"ucg_rate": 0.2, "is_trainable": True},
        embed_dim=WIDTH,
        n_classes=5,
        add_sequence_dim=True,
    )
    network = {"num_classes": "sequential", "adm_in_channels": 16, "context_dim": WIDTH, "transformer_depth": 1}
    schedule = {
        "target": "sgm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [1], "cycle_lengths": [9], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]},
    }
    built = compat.instantiate(sgm(classes, size, corner, network=network, scheduler_config=schedule))
    batch = {"cls": torch.tensor([0, 4]), "original_size_as_tuple": [(8, 8)] * 2, "crop_coords_top_left": [(0, 0)] * 2}
    assert isinstance(built.model, LatentDiffusion)
    dropped = built.model.condition(batch, torch.tensor([[True, False, False], [False, False, False]]))
    assert not dropped.context[0].any() and dropped.context[1].any()
    ddconfig = kl()["params"]["ddconfig"]
    half = {
        name: {"target": f"sgm.modules.diffusionmodules.model.{name}", "params": ddconfig}
        for name in ("Encoder", "Decoder")
    }
    loss = {
        "target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
        "params": {
            "perceptual_weight": 0.25,
            "disc_start": 1,
            "disc_weight": 0.5,
            "regularization_weights": {"kl_loss": 1.0},
        },
    }
    engine = {
        "target": "sgm.models.autoencoder.AutoencodingEngine",
        "params": {
            "input_key": "jpg",
            "encoder_config": half["Encoder"],
            "decoder_config": half["Decoder"],
            "loss_config": loss,
            "regularizer_config": {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"},
        },
    }
    node = compat.translate_node(engine)
    assert node["params"]["loss"]["params"]["kl_weight"] == 1.0 and node["params"]["image_key"] == "jpg"
    autoencoder = config.instantiate(node["params"]["model"])
    assert not any(name.startswith(("quant_conv", "post_quant_conv")) for name in autoencoder.state_dict())
    assert autoencoder.decode(autoencoder.encode_mode(torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("denoiser_config", "target"), f"{SGM}.denoiser.Denoiser", "denoiser_config.target"),
        (
            ("denoiser_config", "params", "scaling_config", "target"),
            f"{SGM}.denoiser_scaling.EDMScaling",
            "scaling_config.target",
        ),
        (
            ("conditioner_config", "params", "emb_models", 0, "target"),
            f"{ENCODERS}.FrozenT5Embedder",
            "emb_models[0].target",
        ),
        (
            ("conditioner_config", "params", "emb_models", 1, "legacy_ucg_value"),
            "none",
            "emb_models[1].legacy_ucg_value",
        ),
        (("optimizer_config",), {"target": "lion.Lion"}, "optimizer_config"),
        (("network_config", "params", "adm_in_channel"), 3, "network_config.params.adm_in_channel: unknown"),
    ],
)
def test_what_of_sgm_is_not_ours_is_refused_by_its_name(place, value, says):
    node = sgm_xl()
    inner = node["params"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    message = problem(node)
    assert says in message and len(message) <= 300


def test_every_cell_of_the_documentation_names_a_test():
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "exchange.md").read_text().partition("Each cell names its test")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["dialect", "read", "written", "sampled", "trained"] and len(rows) > 10
    there = {
        name for file in (root / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for _, *cells in rows[2:]:
        for cell in cells:
            names = re.findall(r"`(test_\w+)`", cell)
            assert names or cell in ("–", "the same", "as above"), cell
            assert {*names} <= there, {*names} - there
