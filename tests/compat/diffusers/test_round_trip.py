"""Ours -> diffusers -> ours: nothing changes, or the parameter that diffusers cannot express is named."""

import json
from pathlib import Path

import diffusers_models as models
import pytest
import tiny
import torch
from omegaconf import OmegaConf

from ldm import compat, config
from ldm.compat.diffusers import pipelines, read, write
from ldm.errors import ConfigError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_first_stage
from ldm.models.saving import save_model
from ldm.weights.folders import to_ours, to_theirs

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("autoencoder", "ldm", "demo", "stability")
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / "configs" / folder).glob("*.y*"))
# What of a shipped model diffusers has no pipeline or class for.
REFUSED = {
    "norm_groups": (
        "autoencoder_photos", "class_digits", "inpainting_photos", "autoencoder_emoji_styles",
        "autoencoder_emoji_styles_small", "txt2img_emoji_styles", "txt2img_emoji_styles_small",
    ),
    "channels": ("superres_photos",),
    "DiT": ("dit_xl", "lightningdit_xl", "sit_b", "sit_l", "sit_s", "sit_xl"),
    "conditioner": ("layout_shapes", "retrieval_shapes", "semantic_shapes",
                    "class2img_f4", "class2img_f8", "inpainting", "layout2img_coco",
                    "layout2img_openimages", "retrieval_768", "semantic_synthesis_256", "semantic_synthesis_512"),
    "num_heads": ("inpainting_big", "lsun_churches"),
    "process": ("txt2img_shapes_edm", "txt2img_shapes_flow", "txt2img_tiny"),
    "regularizer": ("txt2img_256",),
}  # fmt: skip


def shipped(path: Path) -> models.Config:
    return OmegaConf.to_container(compat.load(path, check=False), resolve=True)["model"]


def write_json(folder: Path, described: pipelines.Folder) -> Path:
    """Write the JSON files of a folder; return its index."""
    files = {Path(part.folder) / "config.json": part.config for part in described.parts} | described.files
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for part in described.parts:
        (folder / part.tokenizer).mkdir(exist_ok=True)
    return folder / ("model_index.json" if described.files else "config.json")


def each_config() -> list:
    """Return all shipped configs, one of each kind in the default suite."""
    fast = ("ffhq", "txt2img", "lsun_churches", "kl_f8", "vq_f4_noattn", "autoencoder_photos", "txt2img_shapes_flow")
    slow = pytest.mark.slow
    return [pytest.param(path, id=path.stem, marks=[] if path.stem in fast else slow) for path in SHIPPED]


@pytest.mark.parametrize("path", each_config())
def test_every_shipped_config_is_expressed_or_refused_by_the_name_of_its_parameter(path, tmp_path, seen):
    section = shipped(path)
    check_networks(section, seen)
    refusal = next((word for word, names in REFUSED.items() if path.stem in names), None)
    if refusal is not None:
        with pytest.raises(ConfigError, match=refusal) as refused:
            write(section, 1.0)
        assert len(str(refused.value)) <= 300
        return
    scale = 1.0 if path.stem.startswith("superres") else 0.5  # that pipeline scales no latents
    described = write(section, scale)
    again = read(write_json(tmp_path, described))
    for part, back in zip(described.parts, again.parts, strict=True):
        assert (part.names, part.prefix, part.config) == (back.names, back.prefix, back.config)
    if described.files:
        assert again.section["params"]["latent_scale"] == scale


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Give the networks that a test of this module has looked at."""
    return set()


def check_networks(section: models.Config, seen: set[str]) -> None:
    """Check that names and shapes of network and first stage come back, whatever the condition is."""
    is_whole = not section["target"].endswith("Autoencoder")
    for node in [section["params"][name] for name in ("network", "autoencoder")] if is_whole else [section]:
        node = {"target": node["target"], "params": node["params"]}
        if json.dumps(node) in seen:
            continue
        seen.add(json.dumps(node))
        try:
            (part,) = write(node, 1.0).parts
        except ConfigError as error:
            assert any(word in str(error) for word in ("num_heads", "norm_groups", "DiT"))
            continue
        with torch.device("meta"):
            state = config.instantiate(node).state_dict()
        back = to_ours(to_theirs(state, part.names), part.names)
        assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in state.items()}


NETWORKS = {
    "one width of heads": models.unet(),
    "one head": models.unet(num_heads=1),
    "heads of one level": models.unet(num_heads=4),
    "blocks change the resolution": models.unet(resblock_updown=True),
    "scale and shift": models.unet(scale_shift_norm=True),
    "classes": models.unet(num_classes=5),
    "attention everywhere": models.unet(attention_factors=[1, 2], num_res_blocks=2),
    "no attention but in the middle": models.unet(attention_factors=[]),
    "context": models.unet(context_dim=24, num_heads=2),
    "context, heads of one width, depth 2": models.unet(context_dim=24, transformer_depth=2),
}
FIRST_STAGES = {
    "kl": models.autoencoder(),
    "kl without attention": models.autoencoder(attention="none"),
    "kl, attention in the middle": models.autoencoder(attention_resolutions=[]),
    "kl, 8 groups": models.autoencoder(norm_groups=8, channel_mult=[1, 1, 2]),
    "vq": models.autoencoder("VectorQuantizer"),
    "vq of 6 channels": models.autoencoder("VectorQuantizer", channels=6, attention="none"),
}


@pytest.mark.parametrize("node", {**NETWORKS, **FIRST_STAGES}.values(), ids=[*NETWORKS, *FIRST_STAGES])
def test_a_single_network_keeps_every_bit(node, tmp_path):
    folder, built = models.folder_of(node, tmp_path / "folder")
    filled = config.instantiate({**read(folder / "config.json").section, "checkpoint": str(folder)})
    before, after = built.state_dict(), filled.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def check_whole(section: models.Config, folder: Path) -> LatentDiffusion:
    folder, built = models.folder_of(section, folder)
    loaded = LatentDiffusion.from_pretrained(folder)
    before, after = built.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(built.scale_factor, loaded.scale_factor)
    return loaded


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [("linear", "Epsilon"), ("sqrt_linear", "Sample"), ("sqrt", "Velocity"), ("cosine", "Epsilon")],
)
def test_a_model_without_condition_keeps_every_bit(schedule, prediction, tmp_path):
    process = tiny.node(f"diffusion.discrete.DiscreteVP.{schedule}", num_steps=models.STEPS)
    section = models.unconditional(process=process, prediction=tiny.node(f"diffusion.prediction.{prediction}"))
    loaded = check_whole(section, tmp_path / "folder")
    assert type(loaded.prediction).__name__ == prediction
    assert loaded.image_size == (models.SIDE, models.SIDE)


def test_models_of_texts_keep_every_bit(bert_folder, clip_folder, tmp_path):
    for name, section in (("bert", models.with_bert(bert_folder)), ("clip", models.with_clip(clip_folder))):
        loaded = check_whole(section, tmp_path / name)
        assert torch.isfinite(loaded.sample(["red"], steps=2, size=(models.SIDE, models.SIDE))).all()


@pytest.mark.parametrize("name", ["sd2", "inpainting", "sdxl", "super_resolution"])
def test_the_family_of_stable_diffusion_keeps_every_bit(name, clip_folder, open_clip_folder, tmp_path):
    family = models.FAMILY | {"super_resolution": lambda *_: models.super_resolution()}
    section = family[name](clip_folder, open_clip_folder)
    loaded = check_whole(section, tmp_path / "folder")
    assert loaded.prediction == config.instantiate(section).prediction
    given = {
        "sdxl": {"caption": ["red"]},
        "sd2": {"caption": ["red"]},
        "super_resolution": {"low_res": torch.ones(1, 3, 8, 8)},
        "inpainting": {"caption": ["red"], "mask": torch.ones(1, 1, 16, 16), "masked_image": torch.ones(1, 3, 16, 16)},
    }
    guidance = 1.0 if name == "super_resolution" else 2.0
    options = {"steps": 2, "size": (models.SIDE, models.SIDE), "guidance": guidance}
    before = models.build(section).sample(given[name], grid=loaded.process.grid, **options)
    assert torch.equal(loaded.sample(given[name], **options), before)


def test_a_tokenizer_that_was_trained_here_makes_the_same_tokens_there(tmp_path):
    text = tiny.text_config(dim=32)
    section = models.model(models.unet(context_dim=32), models.autoencoder(), text)
    built = models.build(section)
    captions = ["a red circle", "a blue square above a red circle"]
    built.cond_stage_model.tokenizer.fit(captions)
    loaded = LatentDiffusion.from_pretrained(save_model(built, tmp_path / "folder", section, "diffusers"))
    asked = [*captions, "A green, square?", ""]
    assert torch.equal(loaded.cond_stage_model.tokenizer(asked), built.cond_stage_model.tokenizer(asked))
    assert torch.equal(loaded.condition({"caption": asked}).context, built.condition({"caption": asked}).context)


def test_a_measured_scale_becomes_a_number(tmp_path):
    section = models.unconditional(latent_scale="measure")
    built = models.build(section)
    built.scale_factor.fill_(0.123)
    loaded = LatentDiffusion.from_pretrained(save_model(built, tmp_path / "folder", section, "diffusers"))
    assert torch.equal(loaded.scale_factor, built.scale_factor)


def test_a_first_stage_is_read_alone_and_out_of_a_pipeline(tmp_path):
    folder, built = models.folder_of(models.unconditional(), tmp_path / "folder")
    expected = built.first_stage_model.state_dict()
    for path in (folder, folder / "vqvae"):
        state = load_first_stage(path).autoencoder.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("grid", "fields"),
    [
        ("uniform", ("trailing", True)),
        (tiny.node("diffusion.grids.Leading", offset=1), ("leading", False)),
        (tiny.node("diffusion.grids.Leading", end="clean"), ("leading", True)),
        (tiny.node("diffusion.grids.Linspace"), ("linspace", True)),
    ],
    ids=["uniform", "as published", "leading to clean data", "linspace"],
)
def test_the_grid_is_carried(grid, fields, tmp_path):
    inner = tiny.node("diffusion.discrete.DiscreteVP.linear", num_steps=models.STEPS)
    process = tiny.node("diffusion.discrete.DiscreteVP.on_grid", process=inner, grid=grid)
    described = write(models.unconditional(process=process), 1.0)
    scheduler = described.files["scheduler/scheduler_config.json"]
    assert (scheduler["timestep_spacing"], scheduler["set_alpha_to_one"]) == fields
    again = read(write_json(tmp_path, described)).section["params"]["process"]
    assert again["params"]["process"]["target"] == inner["target"]
    if grid != "uniform":
        given, back = (config.instantiate(node["params"]["grid"]) for node in (process, again))
        assert given == back
