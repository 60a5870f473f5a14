"""Scripts that start from maps and layouts, reconstruct, and published files: to pictures, on tiny random models."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import CLASSES, ROOT, fails, load, noise, record, run, save, script, trained_on

from ldm.compat import translate
from ldm.config import instantiate

NAMES = ("inpaint", "superres", "semantic2img", "layout2img", "reconstruct")
inpaint, superres, semantic2img, layout2img, reconstruct = (script(name).main for name in NAMES)


def test_semantic_maps(runs, tmp_path):
    indices = noise(16, 18, 1) % CLASSES
    save(tmp_path / "in" / "grey.png", indices)
    palette = Image.fromarray(indices[:, ::-1].copy()).convert("P")
    palette.putpalette([value for i in range(CLASSES) for value in (i, 90, 200)])
    palette.save(tmp_path / "in" / "palette.png")
    run(semantic2img, runs["semantic"], tmp_path / "out", "--indir", tmp_path / "in")
    a, b = (load(tmp_path / "out" / f"{name}.png") for name in ("grey", "palette"))
    assert a.shape == b.shape == (16, 18, 3) and not np.array_equal(a, b)
    assert load(tmp_path / "out" / "grid-0000.png").shape == (16, 4 * 18, 3)
    run(semantic2img, runs["semantic"], tmp_path / "large", "--map", tmp_path / "in" / "grey.png", "--W", 40, "--tile")
    assert load(tmp_path / "large" / "grey.png").shape == (16, 40, 3)


def test_pixels_of_no_class_and_arrays(runs, tmp_path, capsys):
    indices = noise(16, 16, 1) % CLASSES
    indices[4:8] = 255
    file = save(tmp_path / "a.png", indices)
    np.save(tmp_path / "b.npy", indices.astype(np.int32))
    common = ("--run", runs["semantic"], "--steps", 2, "--device", "cpu", "--outdir", tmp_path / "no", "--map")
    assert "has class 255; this model has classes 0 to 3" in fails(capsys, semantic2img, *common, file)
    model = trained_on(tmp_path / "run", runs["semantic"], ignore_index=255)
    for name in ("a.png", "b.npy"):
        run(semantic2img, model, tmp_path / "out", "--map", tmp_path / name)
    assert np.array_equal(load(tmp_path / "out" / "a.png"), load(tmp_path / "out" / "b.png"))
    assert not load(tmp_path / "out" / "grid-0000.png")[4:8, :16].any()
    save(tmp_path / "c.png", np.where(indices == 255, 0, indices))
    run(semantic2img, model, tmp_path / "out", "--map", tmp_path / "c.png")
    assert not np.array_equal(load(tmp_path / "out" / "a.png"), load(tmp_path / "out" / "c.png"))
    wrong = save(tmp_path / "d.png", np.where(indices == 255, 9, indices))
    common = ("--run", model, *common[2:])
    assert "has class 9; this model has classes 0 to 3, and 255 for none" in fails(capsys, semantic2img, *common, wrong)


def test_bad_maps(runs, tmp_path, capsys):
    common = ("--run", runs["semantic"], "--steps", 2, "--device", "cpu", "--outdir", tmp_path / "out", "--indir")
    wrong = save(tmp_path / "wrong.png", np.full((8, 8), CLASSES, np.uint8))
    assert "has class 4; this model has classes 0 to 3" in fails(capsys, semantic2img, *common, wrong)
    colours = save(tmp_path / "colours.png", noise(8, 8))
    assert "it has the mode RGB" in fails(capsys, semantic2img, *common, colours)


LAYOUT = [{"label": 1, "box": [0.1, 0.1, 0.4, 0.5]}, {"name": "dog", "box": [0.5, 0.4, 0.5, 0.6]}]


@pytest.mark.parametrize("model", ["layout", "tokens"])
def test_layouts(runs, tmp_path, model):
    other = [{"label": 0, "box": [0, 0, 1, 1]}]
    (tmp_path / "two.json").write_text(json.dumps([LAYOUT, other]))
    (tmp_path / "names.txt").write_text("cat\ncow\ndog\npig\n")
    arguments = ("--layout", tmp_path / "two.json", "--names", tmp_path / "names.txt", "-n", 2, "--seed", 5)
    run(layout2img, runs[model], tmp_path / "out", *arguments)
    images = [load(tmp_path / "out" / "samples" / f"{i:05}.png") for i in range(4)]
    assert images[0].shape == (16, 16, 3)
    samples = record(tmp_path / "out")["samples"]
    assert samples[1]["objects"][1]["label"] == 2 and samples[2]["objects"][0]["box"] == [0, 0, 1, 1]
    (tmp_path / "one.json").write_text(json.dumps(other))
    run(layout2img, runs[model], tmp_path / "b", "--layout", tmp_path / "one.json", "--seed", 5)
    assert not np.array_equal(images[0], load(tmp_path / "b" / "samples" / "00000.png"))


@pytest.mark.parametrize("model", ["layout", "tokens"])
def test_tiles_of_layouts(runs, tmp_path, model):
    """One tile is the whole; of several, each sees its own part."""
    (tmp_path / "a.json").write_text(json.dumps([{"label": 1, "box": [0, 0, 0.2, 0.2]}]))
    (tmp_path / "b.json").write_text(json.dumps([{"label": 2, "box": [0, 0, 0.2, 0.2]}]))
    for name, arguments in (("plain", ()), ("one", ("--tile", 16)), ("many", ("--W", 32, "--tile", 8, "--scale", 2))):
        for layout in "ab":
            where = tmp_path / name / layout
            run(layout2img, runs[model], where, "--layout", tmp_path / f"{layout}.json", *arguments, steps=1)
    images = {path.parents[1]: load(path).astype(int) for path in tmp_path.rglob("00000.png")}
    whole, one = images[tmp_path / "plain" / "a"], images[tmp_path / "one" / "a"]
    assert np.abs(whole - one).max() <= 1
    changed = np.abs(images[tmp_path / "many" / "a"] - images[tmp_path / "many" / "b"]).max(axis=(0, 2))
    assert changed[:8].max() > 0
    assert changed[24:].max() <= 1 or changed[24:].max() < changed[:8].max() / 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ("[]", "is no list of objects"),
        ([{"label": 1}], "object 0: needs `box`"),
        ([{"label": 4, "box": [0, 0, 1, 1]}], "label 4 is none of this model's classes 0 to 3"),
        ([{"name": "dog", "box": [0, 0, 1, 1]}], "give --names"),
        ([{"label": 1, "box": [0, 0, 1]}], "box must be"),
        ('[{"label": 1, "box": [NaN, 0, 0.5, 1]}]', "box must be"),
        ('[{"label": 1, "box": [0, 0, Infinity, 1]}]', "box must be"),
        ([{"label": 1, "box": [0, 0, True, 1]}], "box must be"),
        ([{"label": True, "box": [0, 0, 1, 1]}], "label True is none of"),
        ([{"name": ["a"], "box": [0, 0, 1, 1]}], "the name ['a'] is unknown"),
        ([{"label": 1, "box": [0.5, 0.5, 0.6, 0.2]}], "lies outside"),
        ([{"label": 1, "box": [0.5, 0.5, 0.0, 0.2]}], "has no area"),
        ([LAYOUT[0]] * 4, "has 4 objects; this model takes 3"),
    ],
)
def test_bad_layouts(runs, tmp_path, capsys, content, message):
    file = tmp_path / "layout.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    common = ("--run", runs["layout"], "--steps", 2, "--device", "cpu", "--outdir", tmp_path / "out")
    assert message in fails(capsys, layout2img, *common, "--layout", file)


@pytest.mark.parametrize("content", ["5", "null", '{"dog": "x"}', '{"dog": true}', '["a", ["b"]]'])
def test_bad_names(runs, tmp_path, capsys, content):
    names = tmp_path / "names.json"
    names.write_text(content)
    common = ("--run", runs["layout"], "--outdir", tmp_path / "out", "--layout", tmp_path / "layout.json")
    assert "names.json: is neither a list of names nor" in fails(capsys, layout2img, *common, "--names", names)


@pytest.mark.parametrize("model", ["autoencoder", "none"])
def test_reconstructions(runs, tmp_path, model, caplog):
    pictures = {"a": noise(16, 19), "b": noise(13, 9, seed=1)}
    for name, picture in pictures.items():
        save(tmp_path / "in" / f"{name}.png", picture)
    run(reconstruct, runs[model], tmp_path / "out", "--indir", tmp_path / "in", steps=None)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rebuilt = load(tmp_path / "out" / "a.png")
    assert rebuilt.shape == (16, 19, 3)
    error = ((rebuilt.astype(float) - pictures["a"]) ** 2).mean()
    assert written["images"][0]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.1)
    assert "ssim" in written["images"][0] and "ssim" not in written["images"][1]
    assert written["num_images"] == 2 and "psnr" in written["mean"]
    run(reconstruct, runs[model], tmp_path / "whole", "--indir", tmp_path / "in", "--tile", 32, steps=None)
    assert np.array_equal(load(tmp_path / "whole" / "a.png"), rebuilt)
    run(reconstruct, runs[model], tmp_path / "tiles", "--indir", tmp_path / "in", "--tile", 8, steps=None)
    assert load(tmp_path / "tiles" / "a.png").shape == rebuilt.shape


def test_reconstructions_read_the_range_of_the_training_data_and_make_no_grid_if_told(runs, tmp_path):
    picture = noise(8, 8, channels=1)
    for name, array in (("8", picture), ("12", picture.astype(np.uint16) * 16)):
        save(tmp_path / "in" / f"{name}.png", array)
    model = trained_on(tmp_path / "run", runs["none"], value_range=[0, 4080])
    run(reconstruct, model, tmp_path / "out", "--indir", tmp_path / "in", "--skip_grid", steps=None)
    assert np.array_equal(load(tmp_path / "out" / "8.png"), load(tmp_path / "out" / "12.png"))
    assert not list((tmp_path / "out").glob("grid-*.png")) and len(record(tmp_path / "out")["samples"]) == 2


@pytest.mark.parametrize("flag", ["--seed", "--batch_size"])
def test_reconstructions_offer_no_arguments_without_effect(runs, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        reconstruct(["--run", str(runs["none"]), "--indir", str(tmp_path), flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_bad_reconstructions(runs, tmp_path, capsys):
    picture = save(tmp_path / "a.png", noise(8, 8))
    common = ("--outdir", tmp_path / "out", "--device", "cpu", "--run", runs["autoencoder"])
    assert "--tile 3: the side must be" in fails(capsys, reconstruct, *common, "--indir", picture, "--tile", 3)
    assert "no such file or folder" in fails(capsys, reconstruct, *common, "--indir", tmp_path / "no")
    assert not (tmp_path / "out").exists()


def published(folder, name):
    """Save a published model, narrowed to be small, as its zip lays it out."""
    config = json.loads((ROOT / "tests" / "reference" / "published_configs" / f"models__ldm__{name}.json").read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1, 2]}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1}
    if "bbox" in params["cond_stage_key"]:
        params["unet_config"]["params"] |= {"context_dim": 32, "transformer_depth": 1}
        params["cond_stage_config"]["params"] |= {"n_embed": 32, "n_layer": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": instantiate(translate(config)["model"]).state_dict()}, folder / "model.ckpt")
    return ["--config", folder / "config.yaml", "--ckpt", folder / "model.ckpt", "--outdir", folder / "out"]


@pytest.mark.parametrize("name", ["inpainting_big", "bsr_sr", "semantic_synthesis256", "layout2img-openimages256"])
def test_published_files(tmp_path, name):
    picture, size = save(tmp_path / "a.png", noise(40, 48)), (40, 48, 3)
    mask = save(tmp_path / "m.png", noise(40, 48, 1))
    small, indices = save(tmp_path / "s.png", noise(10, 12)), save(tmp_path / "i.png", noise(40, 48, 1) % 182)
    (tmp_path / "l.json").write_text(json.dumps([{"label": 600, "box": [0, 0, 0.5, 1]}]))
    main, inputs, file = {
        "inpainting_big": (inpaint, ["--image", picture, "--mask", mask], "a.png"),
        "bsr_sr": (superres, ["--indir", small], "s.png"),
        "semantic_synthesis256": (semantic2img, ["--map", indices], "i.png"),
        "layout2img-openimages256": (layout2img, ["--layout", tmp_path / "l.json", "--H", 48, "--W", 48], None),
    }[name]
    main(list(map(str, [*published(tmp_path, name), *inputs, "--steps", 2, "--device", "cpu"])))
    expected = (48, 48, 3) if file is None else size
    assert load(tmp_path / "out" / (file or "samples/00000.png")).shape == expected
