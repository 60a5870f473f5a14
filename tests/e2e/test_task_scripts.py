"""Scripts that start from pictures, inpaint and superres: from a run folder to files, on tiny random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import node
from tiny_runs import (
    diffusion_config,
    fails,
    load,
    noise,
    record,
    run,
    save,
    script,
    trained_on,
    write_run,
)

from ldm.cli.inpaint import request_of
from ldm.cli.inputs import Source
from ldm.conditioning.images import FirstStageConditioner

inpaint, superres = script("inpaint").main, script("superres").main


@pytest.fixture
def masked(tmp_path):
    """Give a folder with two pictures and masks, of sides that the model cannot have."""
    holes = np.zeros((17, 22), dtype=np.uint8)
    holes[4:9, 5:15] = 255
    for seed, name in enumerate(("a", "sub/b")):
        save(tmp_path / "in" / f"{name}.png", noise(17, 22, seed=seed))
        save(tmp_path / "in" / f"{name}_mask.png", holes)
    return tmp_path / "in", holes > 0


@pytest.mark.parametrize("model", ["inpaint", "none"])
@pytest.mark.parametrize("options", [(), ("--tile", 8)])
def test_inpainting_keeps_what_is_known_to_the_bit(runs, tmp_path, masked, model, options):
    folder, hole = masked
    run(inpaint, runs[model], tmp_path / "out", "--indir", folder, *options)
    for seed, name in enumerate(("a", "sub/b")):
        filled, picture = load(tmp_path / "out" / f"{name}.png"), noise(17, 22, seed=seed)
        assert np.array_equal(filled[~hole], picture[~hole])
        assert (filled[hole] != picture[hole]).mean() > 0.5
    assert load(tmp_path / "out" / "grid-0000.png").shape == (17, 4 * 22, 3)


def test_inpainting_sees_a_black_hole_and_a_mask_of_plus_and_minus_one():
    """As the published weights expect it; what is filled up to sides that the model can have is known."""
    image, hole = torch.full((3, 5, 6), 255, dtype=torch.uint8), torch.zeros(1, 5, 6, dtype=torch.bool)
    hole[:, 1:3, 2:4] = True
    conditioner = FirstStageConditioner(mask_key="mask")
    request = request_of(Source(Path("a.png"), "a", Path("m.png")), image, hole, conditioner, 4)
    assert request.size == (8, 8) and request.target is None
    mask, masked = request.conditions["mask"], request.conditions["masked_image"]
    expected = torch.full((1, 8, 8), -1.0)
    expected[:, 1:3, 2:4] = 1.0
    assert torch.equal(mask, expected) and torch.equal(masked, -expected.expand(3, -1, -1))


@pytest.mark.parametrize("model", ["inpaint", "none"])
def test_images_are_drawn_on_beyond_their_edges(runs, tmp_path, masked, model):
    folder, _ = masked
    image = save(tmp_path / "a.png", noise(17, 22))
    run(inpaint, runs[model], tmp_path / "out", "--image", image, "--outpaint", "3,0,8,5")
    drawn = load(tmp_path / "out" / "a.png")
    assert drawn.shape == (22, 33, 3) and np.array_equal(drawn[:17, 3:25], noise(17, 22))
    assert (drawn[17:] != 0).any() and (drawn[:, 25:] != 0).any()


def test_what_is_filled_up_beside_a_hole_is_hole():
    """Sides that the model cannot have are filled up by repetition: at an edge of the hole, with hole."""
    image, hole = torch.full((3, 5, 6), 255, dtype=torch.uint8), torch.zeros(1, 5, 6, dtype=torch.bool)
    hole[:, :, 4:] = True
    conditioner = FirstStageConditioner(mask_key="mask")
    conditions = request_of(Source(Path("a.png"), "a"), image, hole, conditioner, 4).conditions
    assert (conditions["mask"][:, :, 4:] == 1).all() and (conditions["mask"][:, :, :4] == -1).all()
    assert (conditions["masked_image"][:, :, 4:] == -1).all()


@pytest.mark.parametrize("margins", ["1,2,3", "a,b,c,d", "0,0,0,0", "-1,0,0,0", "9999999,0,0,0", ""])
def test_bad_margins(runs, tmp_path, masked, margins, capsys):
    words = ["--run", runs["none"], "--outdir", tmp_path / "out", "--indir", masked[0], f"--outpaint={margins}"]
    assert "--outpaint" in fails(capsys, inpaint, *words)


def test_nothing_below_the_mask_reaches_the_model(runs, tmp_path, masked):
    folder, hole = masked
    pictures = {name: noise(17, 22) for name in ("a", "inside", "outside")}
    pictures["inside"][hole] = 200
    pictures["outside"][~hole] //= 2
    for name, picture in pictures.items():
        image = save(tmp_path / f"{name}.png", picture)
        run(inpaint, runs["inpaint"], tmp_path / "out", "--image", image, "--mask", folder / "a_mask.png")
    a, inside, outside = (load(tmp_path / "out" / f"{name}.png")[hole] for name in pictures)
    assert np.array_equal(a, inside) and not np.array_equal(a, outside)


def test_the_published_inpainting_model_is_found(runs, tmp_path, masked, monkeypatch, capsys):
    arguments = list(map(str, ["--indir", masked[0], "--outdir", tmp_path / "out", "--steps", 2, "--device", "cpu"]))
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, inpaint, *arguments)
    assert "no model: give --run" in message and "put it at models/ldm/inpainting_big/last.ckpt" in message
    place = tmp_path / "models" / "ldm" / "inpainting_big"
    place.mkdir(parents=True)
    for file in ("configs/config.yaml", "checkpoints/last.ckpt"):
        (place / Path(file).name).symlink_to(runs["inpaint"] / file)
    inpaint(arguments)
    assert (tmp_path / "out" / "a.png").is_file()


def test_what_inpainting_cannot_keep_is_named_once(runs, tmp_path, masked, caplog):
    folder, hole = masked
    for name in ("c", "d"):
        save(folder / f"{name}.png", noise(17, 22, channels=1).astype(np.uint16) * 200)
        save(folder / f"{name}_mask.png", hole.astype(np.uint8))
    run(inpaint, runs["inpaint"], tmp_path / "out", "--indir", folder)
    warnings = [record.message for record in caplog.records if "more than 8 bits" in record.message]
    assert len(warnings) == 1 and "c.png" in warnings[0]


@pytest.mark.parametrize(("name", "main"), [("superres", superres), ("none", inpaint)])
def test_pictures_are_read_in_the_range_of_the_training_data(runs, tmp_path, name, main):
    """12 bits and floats give what their 8-bit versions give."""
    model = trained_on(tmp_path / "run", runs[name], value_range=[0, 4080])
    picture, mask = noise(8, 8, channels=1), save(tmp_path / "m.png", np.eye(8, dtype=np.uint8))
    files = [save(tmp_path / "in" / "8.png", picture), save(tmp_path / "in" / "12.png", picture.astype(np.uint16) * 16)]
    np.save(tmp_path / "in" / "32.npy", picture.astype(np.float32) * 16)
    for file in (*files, tmp_path / "in" / "32.npy"):
        run(main, model, tmp_path, "--image", file, *(["--mask", mask] if main is inpaint else []))
    assert np.array_equal(load(tmp_path / "8.png"), load(tmp_path / "12.png"))
    assert np.array_equal(load(tmp_path / "8.png"), load(tmp_path / "32.png"))


def test_inpainting_at_another_size_and_several_samples(runs, tmp_path, masked):
    folder, _ = masked
    run(inpaint, runs["inpaint"], tmp_path, "--indir", folder, "--H", 24, "--W", 32, "-n", 2, "--batch-size", 3)
    assert load(tmp_path / "a.png").shape == load(tmp_path / "a-1.png").shape == (24, 32, 3)
    assert not np.array_equal(load(tmp_path / "a.png"), load(tmp_path / "a-1.png"))
    assert [entry["seed"] for entry in record(tmp_path)["samples"]] == [42, 43, 44, 45]


def test_bad_masks(runs, tmp_path, masked, capsys, caplog):
    folder, _ = masked
    common = ("--run", runs["inpaint"], "--steps", 2, "--device", "cpu", "--outdir", tmp_path / "out")
    save(folder / "lonely.png", noise(8, 8))
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:100])
    save(folder / "cut_mask.png", noise(8, 8, 1))
    run(inpaint, runs["inpaint"], tmp_path / "ok", "--indir", folder)
    assert "1 of " in caplog.text and "have no target" in caplog.text and "lonely.png" in caplog.text
    assert "skipped 1 unreadable images" in caplog.text and "cut.png" in caplog.text
    mask, empty = save(tmp_path / "small.png", noise(8, 8, 1)), save(tmp_path / "none.png", noise(17, 22, 1) // 2)
    for arguments, message in [
        (("--image", folder / "a.png", "--mask", mask), "the mask is 8x8, its image 22x17"),
        (("--image", folder / "a.png", "--mask", empty), "none.png: a mask without a hole"),
        (("--image", folder / "a.png"), "nothing to fill"),
        (("--image", folder / "a.png", "--mask", folder / "no.png"), "no such file"),
        (("--indir", tmp_path / "nowhere"), "no such file or folder"),
        (("--indir", mask), "no pair"),
    ]:
        assert message in fails(capsys, inpaint, *common, *arguments)
    common = ("--steps", 2, "--device", "cpu", "--outdir", tmp_path / "out", "--indir", folder)
    assert "conditioned on ImageConditioner" in fails(capsys, inpaint, "--run", runs["superres"], *common)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--tile", 8)])
def test_superresolution_at_any_size(runs, tmp_path, options):
    save(tmp_path / "in" / "grey.png", noise(7, 11, channels=1))
    save(tmp_path / "in" / "alpha.png", noise(9, 10, channels=4))
    run(superres, runs["superres"], tmp_path / "out", "--indir", tmp_path / "in", "--batch-size", 2, *options)
    assert load(tmp_path / "out" / "grey.png").shape == (14, 22, 3)
    assert load(tmp_path / "out" / "alpha.png").shape == (18, 20, 3)
    written = record(tmp_path / "out")
    assert written["samples"][1]["size"] == [14, 22] and written["sampler"]["eta"] == 1.0


def test_superresolution_follows_the_small_picture(runs, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        small = save(tmp_path / "in" / f"{name}.png", noise(8, 8, seed=seed))
        run(superres, runs["superres"], tmp_path, "--indir", small)
    assert not np.array_equal(load(tmp_path / "a.png"), load(tmp_path / "b.png"))
    run(superres, runs["superres"], tmp_path, "--image", tmp_path / "in" / "a.png", "--H", 24, "--W", 20)
    assert load(tmp_path / "a-1.png").shape == (24, 20, 3)


def test_superresolution_is_held_to_the_small_picture_when_asked(runs, tmp_path):
    small = save(tmp_path / "in" / "a.png", noise(9, 8) // 2 + 64)
    run(superres, runs["superres"], tmp_path, "--indir", small, "--consistent")
    drawn, given = (Image.open(path) for path in (tmp_path / "a.png", small))
    again = np.asarray(drawn.resize(given.size, Image.Resampling.BICUBIC), np.float32)
    assert np.abs(again - np.asarray(given, np.float32)).mean() < 4


def test_pictures_of_the_same_size(runs, tmp_path):
    small = save(tmp_path / "in" / "a.png", noise(9, 12))
    run(superres, runs["pairs"], tmp_path, "--indir", small)
    assert load(tmp_path / "a.png").shape == (9, 12, 3)


@pytest.mark.parametrize("channels", [4, 5])
def test_partners_of_other_channels_than_the_picture(tmp_path, channels):
    partner = node("conditioning.images.SpatialRescaler", key="partner", in_channels=channels)
    model = write_run(tmp_path / "run", diffusion_config(partner, extra=channels))
    np.save(tmp_path / "a.npy", noise(8, 8, channels))
    run(superres, model, tmp_path / "out", "--indir", tmp_path / "a.npy")
    assert load(tmp_path / "out" / "a.png").shape == (8, 8, 3)


def test_bad_small_pictures(runs, tmp_path, capsys):
    common = ("--steps", 2, "--device", "cpu", "--outdir", tmp_path / "out")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = save(tmp_path / "good.png", noise(8, 8))
    empty = tmp_path / "empty"
    empty.mkdir()
    runs = {**runs, "maps": trained_on(tmp_path / "maps", runs["pairs"], num_classes=1)}
    for name, place, message in [
        ("superres", tmp_path / "bad.png", "none of 1 images can be read"),
        ("superres", empty, "holds no images"),
        ("semantic", good, "not small images"),
        ("none", good, "conditioned on nothing; super-resolution needs"),
        ("maps", good, "this model sees 1 classes at 1/1 of the output's sides, not small images"),
    ]:
        assert message in fails(capsys, superres, "--run", runs[name], "--indir", place, *common)
    arguments = ("--run", runs["superres"], "--indir", good, *common)
    assert "tile 6: tiles of this model" in fails(capsys, superres, *arguments, "--tile", 6)
    assert "0 samples asked for" in fails(capsys, superres, *arguments, "-n", 0)
    assert "batch_size is 0" in fails(capsys, superres, *arguments, "--batch_size", 0)
