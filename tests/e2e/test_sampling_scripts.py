"""txt2img and sample, from a run folder or from published files to pictures, on tiny random models."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import autoencoder_config, latent_diffusion_config, node, text_config, unet_config
from tiny_runs import ROOT, fails, script, sections

from ldm.cli.options import SamplingParser
from ldm.cli.txt2img import _DEFAULTS, PUBLISHED
from ldm.compat import translate
from ldm.conditioning.text import TextConditioner
from ldm.config import instantiate
from ldm.data.core.pixels import to_bytes, to_bytes_truncated
from ldm.models.latent_diffusion import LatentDiffusion

PROMPT = "a red circle"


txt2img, img2img, sample = script("txt2img").main, script("img2img").main, script("sample").main


def model_config(conditioner, context_dim=None):
    autoencoder = autoencoder_config(4, channel_mult=[1, 2], resolution=16)
    autoencoder["checkpoint"] = "a/first/stage/that/is/gone.ckpt"
    network = unet_config(4, attention_factors=[2], channel_mult=[1, 2], context_dim=context_dim)
    return latent_diffusion_config(network, autoencoder, conditioner)


def build(model):
    """Build with weights of which none is zero, an average unlike the raw weights, and a vocabulary."""
    torch.manual_seed(0)
    without = copy.deepcopy(model)
    del without["params"]["model"]["params"]["autoencoder"]["checkpoint"]
    built = instantiate(without)
    for tensor in [*built.model.model.parameters(), *built.model_ema.buffers()]:
        if tensor.dim() > 1:
            torch.nn.init.normal_(tensor.detach(), std=0.05)
    for module in built.modules():
        if isinstance(module, TextConditioner):
            module.tokenizer.fit([PROMPT, "a blue square above two green triangles"])
    return built


def write_run(folder, model):
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    content = sections(model)
    content["training"] |= {"learning_rate": 1e-4, "allow_untrained_first_stage": True}
    (folder / "configs" / "config.yaml").write_text(yaml.safe_dump(content))
    torch.save({"state_dict": build(model).state_dict()}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    label = node("conditioning.labels.ClassConditioner", num_classes=5, embed_dim=16, null_label=4)
    return {
        "text": write_run(root / "text", model_config(text_config(16, drop_rate=0.1), 16)),
        "class": write_run(root / "class", model_config(label, 16)),
        "none": write_run(root / "none", model_config(None)),
    }


def pictures(folder):
    return [np.asarray(Image.open(file)) for file in sorted((folder / "samples").iterdir())]


def record(folder, number=0):
    return json.loads((folder / f"grid-{number:04}.json").read_text())


def draw(main, run, folder, *arguments):
    main(["--run", str(run), "--outdir", str(folder), "--ddim_steps", "2", "--device", "cpu", *map(str, arguments)])
    return pictures(folder)


def test_bytes_are_rounded_but_on_published_grids_truncated(runs, tmp_path):
    """As measured; and as published, up to one byte darker, wherever steps of the grid are the same."""
    (plain,) = draw(sample, runs["none"], tmp_path / "a", "-n", 1, "--eta", 0)
    expected = LatentDiffusion.from_pretrained(runs["none"]).sample(1, steps=2, seed=42)
    assert np.array_equal(plain, to_bytes(expected)[0].movedim(0, -1).numpy())
    (published,) = draw(sample, runs["none"], tmp_path / "b", "-n", 1, "--eta", 0, "--spacing", "compvis")
    expected = LatentDiffusion.from_pretrained(runs["none"]).sample(1, steps=2, seed=42, grid="compvis")
    assert np.array_equal(published, to_bytes_truncated(expected)[0].movedim(0, -1).numpy())
    assert not torch.equal(to_bytes(expected), to_bytes_truncated(expected))


def almost_equal(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def test_text_to_pictures_grid_and_record(runs, tmp_path):
    images = draw(txt2img, runs["text"], tmp_path, "--prompt", PROMPT, "--n_samples", 3, "--n_iter", 2, "--seed", 7)
    assert [image.shape for image in images] == [(16, 16, 3)] * 6
    assert np.asarray(Image.open(tmp_path / "grid-0000.png")).shape == (32, 48, 3)
    assert not almost_equal(images[0], images[1])
    written = record(tmp_path)
    assert [entry["seed"] for entry in written["samples"]] == list(range(7, 13))
    assert written["samples"][5] == {"file": "samples/00005.png", "seed": 12, "caption": PROMPT}
    assert written["sampler"] == {"name": "DDIM", "steps": 2, "eta": 0.0, "grid": None, "start": None}
    assert (written["scale"], written["weights"], written["size"]) == (5.0, "ema", [16, 16])
    assert (written["guidance"], written["evaluations_per_image"]) == (5.0, 4)
    assert len(written["checkpoint_sha256"]) == 64 and "torch" in written["versions"]


def test_numbers_count_on(runs, tmp_path):
    draw(txt2img, runs["text"], tmp_path, "--n_samples", 2)
    assert len(draw(txt2img, runs["text"], tmp_path, "--n_samples", 1)) == 3
    assert record(tmp_path, 1)["samples"][0]["file"] == "samples/00002.png"


def test_samples_do_not_depend_on_the_batch_size(runs, tmp_path):
    settings = ("--n_samples", 4, "--ddim_eta", 1)
    whole = draw(txt2img, runs["text"], tmp_path / "a", *settings)
    parts = draw(txt2img, runs["text"], tmp_path / "b", *settings, "--batch-size", 3)
    later = draw(txt2img, runs["text"], tmp_path / "c", "--n_samples", 1, "--ddim_eta", 1, "--seed", 45)
    assert almost_equal(whole, parts) and almost_equal(whole[3], later[0])


def test_a_negative_text_changes_the_image_and_is_recorded(runs, tmp_path):
    plain = draw(txt2img, runs["text"], tmp_path / "a", "--prompt", PROMPT, "-n", 1)
    other = draw(txt2img, runs["text"], tmp_path / "b", "--prompt", PROMPT, "-n", 1, "--negative", "two triangles")
    assert not almost_equal(plain, other)
    assert record(tmp_path / "b")["samples"][0]["negative"] == "two triangles"


def test_images_start_from_given_ones(runs, tmp_path, capsys):
    given = tmp_path / "in" / "a.png"
    given.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 30, 3), dtype=np.uint8)).save(given)
    settings = ("--device", "cpu", "--steps", 2, "--indir", given.parent)

    def drawn(name, model, *more):
        img2img(list(map(str, ["--run", runs[model], "--outdir", tmp_path / name, *settings, *more])))
        return [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("a*.png"))]

    first, second = drawn("a", "text", "--prompt", PROMPT, "--strength", 0.5, "-n", 2)
    assert first.shape == (17, 30, 3) and not almost_equal(first, second)
    entry = record(tmp_path / "a")["samples"][1]
    assert (entry["image"], entry["strength"], entry["prompt"], entry["seed"]) == (str(given), 0.5, PROMPT, 43)
    assert [image.shape for image in drawn("b", "none")] == [(17, 30, 3)]
    for model, words, message in (
        ("text", (), "--prompt"), ("none", ("--prompt", PROMPT), "--prompt"), ("class", (), "more than text"),
        ("none", ("--strength", 2), "strength is 2"), ("none", ("--negative", "a"), "negative"),
    ):  # fmt: skip
        assert message in fails(capsys, img2img, "--run", runs[model], "--outdir", tmp_path / "c", *settings, *words)
    assert not (tmp_path / "c").exists()


def test_prompts_of_a_file_and_guidance_change_the_picture(runs, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\na blue square\n")
    images = draw(txt2img, runs["text"], tmp_path / "a", "--from-file", file, "--n_samples", 1, "--seed", 3)
    assert [entry["caption"] for entry in record(tmp_path / "a")["samples"]] == [PROMPT, "a blue square"]
    plain = draw(txt2img, runs["text"], tmp_path / "b", "--prompt", PROMPT, "--n_samples", 1, "--seed", 3, "--scale", 1)
    other = draw(txt2img, runs["text"], tmp_path / "c", "--prompt", "two", "--n_samples", 1, "--seed", 3, "--scale", 1)
    assert not np.array_equal(images[0], plain[0]) and not np.array_equal(plain[0], other[0])


def test_guidance_of_every_kind_is_drawn_counted_and_recorded(runs, tmp_path, caplog):
    words = ("--classes", 1, "-n", 1, "--scale", 3, "--eta", 0)
    plain = draw(sample, runs["class"], tmp_path / "a", *words)
    more = ("--guidance", "interval=0:0.4", "rescale=0.5", "apg_eta=0", "--guide", "ema:raw")
    with caplog.at_level("INFO"):
        guided = draw(sample, runs["class"], tmp_path / "b", *words, *more, "--sampler", "heun:s_churn=2")
    assert not np.array_equal(plain[0], guided[0])
    written = record(tmp_path / "b")
    assert written["guidance"]["interval"] == [0.0, 0.4] and written["guidance"]["guide"]["weights"] == "raw"
    assert written["sampler"]["s_churn"] == 2 and written["evaluations_per_image"] == 4  # of 3, one is guided
    assert "4 network evaluations each" in caplog.text


def test_guidance_that_a_model_cannot_have_is_refused_before_anything_is_written(runs, tmp_path, capsys):
    rest = ("-n", 1, "--outdir", tmp_path / "out", "--device", "cpu", "--steps", 2)
    for run, words, named in (
        ("none", ("--scale", 3), "scale 3 on a model without condition"),
        ("none", ("--guide", runs["text"]), "guide: no effect at scale 1"),
        ("none", ("--scale", 2, "--guide", tmp_path / "no"), "no"),
        ("none", ("--scale", 2, "--guidance", "interval=0:2"), "interval is 0:2"),
        ("none", ("--sampler", "unipc:order=3"), "order is 3; use 1 to 2 for 2 steps"),
        ("class", ("--classes", 1, "--scale", 2, "--guide", runs["text"]), "is conditioned on caption"),
    ):
        assert named in fails(capsys, sample, "--run", runs[run], *rest, *words)
    assert not (tmp_path / "out").exists()


def test_raw_and_averaged_weights_differ(runs, tmp_path):
    averaged = draw(sample, runs["none"], tmp_path / "a", "-n", 1)
    raw = draw(sample, runs["none"], tmp_path / "b", "-n", 1, "--raw")
    assert not almost_equal(averaged, raw)
    assert record(tmp_path / "b")["weights"] == "raw"


def test_classes(runs, tmp_path):
    images = draw(sample, runs["class"], tmp_path, "--classes", "1,3", "-n", 2, "--scale", 3)
    assert len(images) == 4
    assert [entry["class_label"] for entry in record(tmp_path)["samples"]] == [1, 1, 3, 3]


@pytest.mark.parametrize("name", ["plms", "dpm_solver", "ddpm"])
def test_other_samplers_and_sizes(runs, tmp_path, name):
    (image,) = draw(sample, runs["none"], tmp_path, "--sampler", name, "-n", 1, "--H", 24, "--W", 32)
    assert image.shape == (24, 32, 3)
    assert record(tmp_path)["sampler"]["name"].lower() == name.replace("_", "")


def test_tiles_make_larger_pictures(runs, tmp_path):
    (image,) = draw(sample, runs["none"], tmp_path / "a", "-n", 1, "--H", 24, "--W", 40, "--tile")
    assert image.shape == (24, 40, 3)
    settings = ("--prompt", PROMPT, "--n_samples", 1)
    plain = draw(txt2img, runs["text"], tmp_path / "b", *settings)
    tiled = draw(txt2img, runs["text"], tmp_path / "c", *settings, "--tile", 16)
    assert almost_equal(plain, tiled)  # one tile is the whole


def test_published_spacing_may_take_more_steps(runs, tmp_path):
    draw(sample, runs["none"], tmp_path, "-n", 1, "--ddim_steps", 3, "--spacing", "compvis", "--precision", "bf16")
    assert record(tmp_path)["sampler"] == {"name": "DDIM", "steps": 3, "eta": 1.0, "grid": "compvis", "start": None}


def test_a_checkpoint_in_a_run_finds_its_config(runs, tmp_path):
    assert len(draw(sample, runs["none"] / "checkpoints" / "last.ckpt", tmp_path, "-n", 1)) == 1


def published_model():
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 20, "image_size": 8, "channels": 4,
            "cond_stage_key": "class_label", "cond_stage_trainable": True, "conditioning_key": "crossattn",
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
                    "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 1, "context_dim": 16,
                    "use_spatial_transformer": True,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                        "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.ClassEmbedder",
                "params": {"n_classes": 1001, "embed_dim": 16, "key": "class_label"},
            },
        },
    }  # fmt: skip


def build_published(model):
    return instantiate(translate({"model": model})["model"])


def test_published_files(tmp_path):
    published = published_model()
    data = {"target": "main.DataModuleFromConfig", "params": {"train": {"target": "never.released.Faces"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": published, "data": data}))
    torch.manual_seed(0)
    torch.save({"state_dict": build_published(published).state_dict()}, tmp_path / "model.ckpt")
    files = ["--config", tmp_path / "config.yaml", "--ckpt", tmp_path / "model.ckpt"]
    rest = ["--classes", 7, "-n", 2, "--scale", 3, "--ddim_steps", 2, "--outdir", tmp_path / "out"]
    sample(list(map(str, files + rest)))
    assert len(pictures(tmp_path / "out")) == 2


@pytest.mark.parametrize("data", [None, {"params": {"train": {"params": {"size": 64, "crop_size": 24}}}}])
def test_published_files_are_sampled_at_their_image_size(tmp_path, data):
    """Of the latents; the first stage's resolution and the data's size, before cropping, are others."""
    published = published_model()
    published["params"]["image_size"] = 12
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": published, **({"data": data} if data else {})}))
    torch.save({"state_dict": build_published(published).state_dict()}, tmp_path / "model.ckpt")
    sample(list(map(str, ["--run", tmp_path, "--classes", 7, "-n", 1, "--ddim_steps", 1, "--outdir", tmp_path])))
    assert pictures(tmp_path)[0].shape == (24, 24, 3)


@pytest.mark.parametrize("with_config", [True, False])
def test_the_published_text_model_is_found(runs, tmp_path, monkeypatch, capsys, with_config):
    monkeypatch.chdir(tmp_path)
    arguments = ["--n_samples", "1", "--ddim_steps", "1", "--device", "cpu", "--outdir", str(tmp_path / "out")]
    place = "models/ldm/text2img-large/model.ckpt"
    assert f"/nitro/txt2img-f8-large/model.ckpt and put it at {place}" in fails(capsys, txt2img, *arguments)
    files = {place: "checkpoints/last.ckpt"}
    if with_config:
        files["configs/latent-diffusion/txt2img-1p4B-eval.yaml"] = "configs/config.yaml"
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(runs["text"] / source)
    if with_config:
        txt2img(arguments)
        assert len(pictures(tmp_path / "out")) == 1
    else:  # ours of the same name, of which these weights are not
        source = PUBLISHED.apply_default(SamplingParser("txt2img", "", _DEFAULTS).parse(arguments)[1]).model.source
        assert Path(source.config) == ROOT / "configs" / "ldm" / "txt2img.yaml" and source.checkpoint == place


def test_overrides_of_the_config(runs, tmp_path, capsys):
    plain = draw(sample, runs["none"], tmp_path / "a", "-n", 1)
    scaled = draw(sample, runs["none"], tmp_path / "b", "model.params.latent_scale=0.25", "-n", 1)
    assert not almost_equal(plain, scaled)
    common = ("--run", runs["none"], "--device", "cpu", "--outdir", tmp_path / "c")
    assert "latent_scal: unknown; did you mean latent_scale" in fails(
        capsys, sample, *common, "model.params.latent_scal=1"
    )
    assert "data.x=1: has no effect on samples" in fails(capsys, sample, *common, "data.x=1")
    of_texts = ("--run", runs["text"], "--device", "cpu", "--outdir", tmp_path / "c", "--prompt", "red")
    assert "did you mean latent_scale" in fails(capsys, txt2img, *of_texts, "model.params.latent_scal=1")


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    text, none, out = runs["text"], runs["none"], ("--outdir", tmp_path / "out", "--device", "cpu")
    for main, arguments, message in [
        (txt2img, ["--run", text, "--ddim_steps", 0], "steps is 0; use 1 to 20"),
        (txt2img, ["--run", text, "--ddim_steps", 21], "steps is 21"),
        (txt2img, ["--run", text, "--ddim_steps", 2, "--H", 15], "15x16: each side must be a multiple of 2"),
        (txt2img, ["--run", text, "--ddim_steps", 2, "--H", 18], "must be a multiple of"),
        (txt2img, ["--run", text, "--ddim_eta", 0.5, "--plms"], "plms has no eta"),
        (txt2img, ["--run", text, "--ddim_eta", -1], "use 0 (no noise) or more"),
        (txt2img, ["--run", text, "--n_samples", 0], "use 1 or more"),
        (txt2img, ["--run", text, "--ddim_steps", 2, "--batch-size", 0], "batch_size is 0"),
        (txt2img, ["--run", text, "--from-file", tmp_path / "no.txt"], "cannot be read"),
        (txt2img, ["--run", none, "--ddim_steps", 2], "not conditioned on text; use ldm sample"),
        (txt2img, ["--run", tmp_path / "nowhere"], "nowhere: no such checkpoint"),
        (txt2img, [], "no model: give --run"),
        (txt2img, ["--config", text / "configs" / "config.yaml"], "weights are needed beside --config"),
        (txt2img, ["--ckpt", text / "checkpoints" / "none.ckpt"], "none.ckpt: no such checkpoint"),
        (sample, ["--run", text, "--ddim_steps", 2], "for text use ldm txt2img"),
        (sample, ["--run", runs["class"], "--ddim_steps", 2], "classes 0 to 4; choose some with --classes"),
        (sample, ["--run", runs["class"], "--classes", "5", "--ddim_steps", 2], "--classes 5"),
        (sample, ["--run", none, "--classes", "1", "--ddim_steps", 2], "has no classes"),
        (sample, ["--run", none, "-n", 0, "--ddim_steps", 2], "0 samples asked for"),
    ]:
        assert message in fails(capsys, main, *arguments, *out)
    assert "--device nonsense: not usable" in fails(capsys, sample, "--run", none, "--device", "nonsense")
    (tmp_path / "file").write_text("")
    arguments = ["--run", none, "--ddim_steps", 2, "-n", 1, "--outdir", tmp_path / "file"]
    assert "cannot be made" in fails(capsys, sample, *arguments)


def test_configs_that_cannot_be_sampled_from(runs, tmp_path, capsys):
    ckpt = runs["none"] / "checkpoints" / "last.ckpt"
    network = {"target": "ldm.networks.unet.UNet", "params": {"num_head": 3}}
    for content, message in [
        ("model: [", "c.yaml: is not valid YAML"),
        ("data: {}", "has no section model"),
        (yaml.safe_dump({"model": network}), "c.yaml: model.target: is ldm.networks.unet.UNet; samples need"),
        (yaml.safe_dump(sections(model_config(network))), "c.yaml: model.params"),
    ]:
        (tmp_path / "c.yaml").write_text(content)
        assert message in fails(capsys, sample, "--config", tmp_path / "c.yaml", "--ckpt", ckpt)
    assert "none.yaml: no such file" in fails(capsys, sample, "--config", tmp_path / "none.yaml", "--ckpt", ckpt)


def test_weights_of_another_model_do_not_fit(runs, tmp_path, capsys):
    config, ckpt = runs["none"] / "configs" / "config.yaml", runs["text"] / "checkpoints" / "last.ckpt"
    assert "does not fit LatentDiffusion" in fails(capsys, sample, "--config", config, "--ckpt", ckpt)


def test_guidance_without_dropped_conditions_is_warned_of(runs, tmp_path, caplog):
    draw(sample, runs["class"], tmp_path, "--classes", "1", "-n", 1, "--scale", 3)
    assert "this model has drop_rate 0" in caplog.text


def test_status_and_message_of_the_command():
    command = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--run", "no/such/run"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: no/such/run: no such checkpoint")
    assert "Traceback" not in done.stderr
