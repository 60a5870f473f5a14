"""The networks and samples of diffusers itself, loaded by its `from_pretrained` from our folders, are ours."""

import json
from pathlib import Path

import diffusers_models as models
import pytest
import tiny
import torch
from omegaconf import OmegaConf

from ldm import compat, config
from ldm.compat.diffusers import TEXTS, read, write
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling import make_sampler
from ldm.weights import folders

pytestmark = pytest.mark.slow  # importing diffusers takes longer than all of these
LATENT = models.SIDE // 2


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 5e-6) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


UNETS = {
    "one width of heads": models.unet(),
    "one head": models.unet(num_heads=1),
    "heads of one level": models.unet(num_heads=4),
    "new order of queries": models.unet(qkv_order="new"),
    "blocks change the resolution": models.unet(resblock_updown=True, attention_factors=[1], channel_mult=[1, 2, 2]),
    "scale and shift": models.unet(scale_shift_norm=True),
    "attention everywhere": models.unet(attention_factors=[1, 2], num_res_blocks=2),
    "no attention but in the middle": models.unet(attention_factors=[]),
    "context": models.unet(context_dim=24, num_heads=2),
    "context, scale and shift": models.unet(context_dim=24, num_heads=2, scale_shift_norm=True),
    "context, heads of one width, depth 2": models.unet(context_dim=24, transformer_depth=2),
}


@pytest.mark.parametrize("node", UNETS.values(), ids=UNETS)
def test_unets_agree(node, diffusers, tmp_path):
    folder, ours = models.folder_of(node, tmp_path / "unet")
    context_dim = node["params"].get("context_dim")
    kind = diffusers.UNet2DModel if context_dim is None else diffusers.UNet2DConditionModel
    theirs = kind.from_pretrained(folder).eval()
    x, t = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 70])
    if context_dim is None:
        assert near(theirs(x, t).sample, ours(x, t))
    else:
        context = torch.randn(2, 5, context_dim)
        assert near(theirs(x, t, encoder_hidden_states=context).sample, ours(x, t, context=context))


def test_unets_with_classes_agree(diffusers, tmp_path):
    folder, ours = models.folder_of(models.unet(num_classes=5), tmp_path / "unet")
    theirs = diffusers.UNet2DModel.from_pretrained(folder).eval()
    x, t, y = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 70]), torch.tensor([0, 4])
    assert near(theirs(x, t, class_labels=y).sample, ours(x, t, y=y))


KLS = {
    "attention at a level": models.autoencoder(),
    "in the middle": models.autoencoder(attention_resolutions=[]),
    "none": models.autoencoder(attention="none"),
    "8 groups": models.autoencoder(norm_groups=8, channel_mult=[1, 1, 2]),
}


@pytest.mark.parametrize("node", KLS.values(), ids=KLS)
def test_kl_first_stages_agree(node, diffusers, tmp_path):
    folder, ours = models.folder_of(node, tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    x = torch.randn(2, 3, models.SIDE, models.SIDE)
    assert near(theirs.encode(x).latent_dist.parameters, ours.moments(x))
    z = ours.encode_mode(x)
    assert near(theirs.decode(z).sample, ours.decode(z))


@pytest.mark.parametrize("channels", [3, 6])
def test_vq_first_stages_agree(channels, diffusers, tmp_path):
    folder, ours = models.folder_of(models.autoencoder("VectorQuantizer", channels), tmp_path / "vq")
    theirs = diffusers.VQModel.from_pretrained(folder).eval()
    x = torch.randn(2, 3, models.SIDE, models.SIDE)
    z = ours.encode(x)
    assert near(theirs.encode(x).latents, z)
    assert near(theirs.decode(z).sample, ours.decode(z))
    assert near(theirs.decode(z, force_not_quantize=True).sample, ours.decode(z, quantize=False))
    assert near(theirs.quantize(z)[1], ours.quantize(z)[1])


FULL = sorted((Path(__file__).resolve().parents[3] / "configs" / "stability").glob("*.yaml"))


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_stable_diffusion_has_the_names_and_shapes_of_diffusers(path, diffusers):
    """At full size, on the meta device; text encoders are compared with those of transformers by construction."""
    section = OmegaConf.to_container(compat.load(path, check=False), resolve=True)["model"]
    for part in write(section, 0.18215).parts:
        if part.kind in TEXTS:
            continue
        node = section["params"]["network" if part.folder == "unet" else "autoencoder"]
        with torch.device("meta"):
            ours = config.instantiate({key: node[key] for key in ("target", "params")}).state_dict()
            theirs = getattr(diffusers, part.kind.name).from_config(part.config).state_dict()
        renamed = folders.to_theirs(ours, part.names)
        assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in theirs.items()}


# Fields of the published U-Nets that are not at their defaults.
PUBLISHED_UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl_base": {
        "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "addition_embed_type_num_heads": 64,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_UNETS)
def test_published_unets_are_those_of_our_configs(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **PUBLISHED_UNETS[name]}))
    theirs = read(tmp_path / "config.json").section
    path = next(path for path in FULL if path.stem == name)
    ours = OmegaConf.to_container(compat.load(path, check=False), resolve=True)["model"]["params"]["network"]
    with torch.device("meta"):
        states = [config.instantiate(node).state_dict() for node in (theirs, ours)]
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    heads = [node["params"].get("num_heads") or node["params"]["num_head_channels"] for node in (theirs, ours)]
    assert heads[0] == heads[1]


def _pipeline(kind, folder):
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _walk(model: LatentDiffusion, z: torch.Tensor, steps: int, conditioning=None, guidance: float = 1.0, away=None):
    """Return images (B, H, W, C) in [0, 1] by DDIM on the grid that came with the model."""
    with torch.no_grad():
        for step in make_sampler("ddim", steps=steps)(model.denoiser(conditioning, guidance, away), z, model.process):
            z = step.x
        return ((model.decode(z) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("grid", ["uniform", "compvis", tiny.node("diffusion.grids.Leading", end="clean")], ids=str)
@pytest.mark.parametrize("prediction", ["Epsilon", "Velocity"])
def test_50_steps_without_condition_agree(grid, prediction, diffusers, tmp_path):
    inner = tiny.node("diffusion.discrete.DiscreteVP.linear", num_steps=models.STEPS)
    process = tiny.node("diffusion.discrete.DiscreteVP.on_grid", process=inner, grid=grid)
    section = models.unconditional(process=process, prediction=tiny.node(f"diffusion.prediction.{prediction}"))
    folder, _ = models.folder_of(section, tmp_path / "folder")
    pipeline = _pipeline(diffusers.LDMPipeline, folder)
    drawn = pipeline(batch_size=2, generator=torch.Generator().manual_seed(1), output_type="np").images
    z = torch.randn(2, 3, LATENT, LATENT, generator=torch.Generator().manual_seed(1))
    walked = _walk(LatentDiffusion.from_pretrained(folder), z, 50)
    assert walked.std() > 0.01
    assert near(walked, torch.from_numpy(drawn), 1e-5)


def _check_texts(kind, section, folder, encoder: str) -> None:
    """Check that text encoder and images of 50 guided steps are ours; sides are 8 times the latents'."""
    folder, ours = models.folder_of(section, folder)
    pipeline = _pipeline(kind, folder)
    texts = ["a red circle", "two green triangles"]
    ids = ours.cond_stage_model.tokenizer(texts)
    with torch.no_grad():
        assert near(getattr(pipeline, encoder)(ids)[0], ours.cond_stage_model.embed(texts))
    z = torch.randn(2, 4, LATENT, LATENT)
    drawn = pipeline(texts, latents=z, guidance_scale=3.0, num_inference_steps=50, output_type="np",
                     **{side: LATENT * ours.first_stage_model.factor for side in ("height", "width")})  # fmt: skip
    model = LatentDiffusion.from_pretrained(folder)
    walked = _walk(model, z, 50, model.condition({"caption": texts}), 3.0)
    assert walked.std() > 0.01
    assert near(walked, torch.from_numpy(drawn.images), 1e-5)


@pytest.mark.parametrize("text", ["clip", "bert"])
def test_50_guided_steps_of_stable_diffusion_agree(text, clip_folder, bert_folder, diffusers, tmp_path):
    levels = {"channel_mult": [1, 1, 1, 1]}
    section = models.with_clip(clip_folder) if text == "clip" else models.with_bert(bert_folder, **levels)
    _check_texts(diffusers.StableDiffusionPipeline, section, tmp_path / "folder", "text_encoder")


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_50_guided_steps_of_stable_diffusion_2_and_xl_agree(name, clip_folder, open_clip_folder, diffusers, tmp_path):
    section = models.FAMILY[name](clip_folder, open_clip_folder)
    folder, _ = models.folder_of(section, tmp_path / "folder")
    kinds = {"sd2": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
    pipeline = _pipeline(kinds[name], folder)
    texts, size = ["a red circle", "two green triangles"], (models.SIDE, models.SIDE)
    z = torch.randn(2, 4, LATENT, LATENT)
    drawn = pipeline(texts, latents=z, guidance_scale=3.0, num_inference_steps=50, output_type="np", height=size[0],
                     width=size[1])  # fmt: skip
    model = LatentDiffusion.from_pretrained(folder)
    batch = {"caption": texts, **model.entries_for(size, 2)}
    away = model.cond_stage_model.unconditional(2, batch)
    walked = _walk(model, z, 50, model.condition(batch), 3.0, away)
    assert walked.std() > 0.01
    assert near(walked, torch.from_numpy(drawn.images), 1e-5)


def test_50_steps_of_super_resolution_agree(diffusers, tmp_path):
    folder, _ = models.folder_of(models.super_resolution(), tmp_path / "folder")
    pipeline = _pipeline(diffusers.LDMSuperResolutionPipeline, folder)
    image = torch.rand(2, 3, LATENT, LATENT) * 2 - 1
    drawn = pipeline(
        image, num_inference_steps=50, eta=0.0, generator=torch.Generator().manual_seed(1), output_type="np"
    )
    z = torch.randn(2, 3, LATENT, LATENT, generator=torch.Generator().manual_seed(1))
    model = LatentDiffusion.from_pretrained(folder)
    walked = _walk(model, z, 50, model.condition({"low_res": image}))
    assert near(walked, torch.from_numpy(drawn.images), 1e-5)


def test_50_guided_steps_of_the_papers_text_to_image_agree(bert_folder, diffusers, tmp_path):
    section = models.with_bert(bert_folder, max_length=77, channel_mult=[1, 1, 1, 1], resolution=64)
    _check_texts(diffusers.LDMTextToImagePipeline, section, tmp_path / "folder", "bert")
