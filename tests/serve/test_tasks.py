"""Every task on the page: drawn to the byte as its script draws it, and what an order lacks is told."""

import io
import shutil

import numpy as np
import pytest
import yaml
from picture_files import address, png
from PIL import Image
from tiny_runs import load, noise, run, save

from ldm.cli import img2img, inpaint, layout2img, semantic2img, superres
from ldm.serve.orders import Order
from ldm.serve.uploads import Upload

LAYOUT = [{"label": 1, "box": [0.1, 0.1, 0.4, 0.5]}, {"label": 3, "box": [0.5, 0.4, 0.5, 0.6]}]
MAP = (noise(16, 16, 1) % 4).astype(np.uint8)
HOLE = np.zeros((16, 16), np.uint8)
HOLE[4:9, 5:15] = 255
IMAGE = noise(16, 16)


def upload(field, array):
    return Upload.of(field, address(png(array)))


def drawn(studio, folder, **order):
    """Draw one image in the thread of the test, and return the job."""
    job = studio.submit(folder, Order(**{"count": 1, "steps": 2, "seed": 7} | order))
    while job.state in ("waiting", "loading", "drawing"):
        studio._worker.join(0.01)
    return job


def first_image(job):
    assert job.state == "done", job.problem
    return np.asarray(Image.open(io.BytesIO(job.images[0])))


@pytest.mark.parametrize("model", ["layout", "tokens"])
def test_boxes(tasks, studio, tmp_path, model):
    file = tmp_path / "layout.json"
    file.write_text(str(LAYOUT).replace("'", '"'))
    run(layout2img.main, tasks[model], tmp_path / "out", "--layout", file, "--seed", 7)
    job = drawn(studio, tasks[model], layout=LAYOUT)
    assert np.array_equal(first_image(job), load(tmp_path / "out" / "samples" / "00000.png")) and job.source
    controls = studio.controls(tasks[model])
    assert (controls["task"], controls["objects"], controls["tiles"]) == ("layout", 3, False)


def test_maps(tasks, studio, tmp_path):
    file = save(tmp_path / "map.png", MAP)
    run(semantic2img.main, tasks["semantic"], tmp_path / "out", "--map", file, "--seed", 7)
    job = drawn(studio, tasks["semantic"], map=upload("map", np.dstack([MAP] * 3)))
    assert np.array_equal(first_image(job), load(tmp_path / "out" / "map.png"))
    controls = studio.controls(tasks["semantic"])
    assert (controls["task"], controls["map_size"], len(controls["colours"])) == ("map", (16, 16), controls["classes"])


@pytest.mark.parametrize(
    ("model", "options", "channels"), [("superres", (), 3), ("superres", ("--tile",), 3), ("pairs", (), 1)]
)
def test_small_images(tasks, studio, tmp_path, model, options, channels):
    small = noise(16, 12, channels)
    file = save(tmp_path / "small.png", small)
    run(superres.main, tasks[model], tmp_path / "out", "--image", file, "--seed", 7, "--eta", 0, *options)
    job = drawn(studio, tasks[model], image=upload("image", small), tile=bool(options))
    assert np.array_equal(first_image(job), load(tmp_path / "out" / "small.png"))
    assert studio.controls(tasks[model])["factor"] == first_image(job).shape[0] / 16


@pytest.mark.parametrize("model", ["inpaint", "none"])
def test_holes(tasks, studio, tmp_path, model):
    image, mask = save(tmp_path / "a.png", IMAGE), save(tmp_path / "m.png", HOLE)
    run(inpaint.main, tasks[model], tmp_path / "out", "--image", image, "--mask", mask, "--seed", 7)
    filled = first_image(drawn(studio, tasks[model], image=upload("image", IMAGE), mask=upload("mask", HOLE)))
    assert np.array_equal(filled, load(tmp_path / "out" / "a.png"))
    assert np.array_equal(filled[HOLE == 0], IMAGE[HOLE == 0])


def test_starts(tasks, studio, tmp_path):
    image = save(tmp_path / "a.png", IMAGE)
    run(img2img.main, tasks["none"], tmp_path / "out", "--indir", image, "--seed", 7, "--strength", 0.5, steps=4)
    job = drawn(studio, tasks["none"], image=upload("image", IMAGE), strength=0.5, steps=4)
    assert np.array_equal(first_image(job), load(tmp_path / "out" / "a.png"))


def test_conditions_of_an_item(tasks, studio):
    """Of retrieval, neighbours of an item of the validation data; of whatever has no control of its own."""
    jobs = [drawn(studio, tasks["retrieval"], item=item) for item in (0, 1)]
    assert studio.controls(tasks["retrieval"])["task"] == "item"
    assert not np.array_equal(*map(first_image, jobs))


def test_pixels_of_no_class(tasks, studio, tmp_path):
    """Their index is that of the training data's files."""
    model = tmp_path / "run"
    shutil.copytree(tasks["semantic"], model)
    content = yaml.safe_load((model / "configs" / "config.yaml").read_text())
    content["data"]["params"]["train"]["params"]["ignore_index"] = 255
    (model / "configs" / "config.yaml").write_text(yaml.safe_dump(content))
    jobs = [drawn(studio, model, map=upload("map", array)) for array in (MAP, np.where(MAP == 2, 255, MAP))]
    assert studio.controls(model)["no_class"] == 255 and not np.array_equal(*map(first_image, jobs))


@pytest.mark.parametrize(
    ("model", "order", "named"),
    [
        ("layout", {}, "layout: is no list of objects"),
        ("layout", {"layout": LAYOUT * 2}, "has 4 objects; this model takes 3"),
        ("layout", {"layout": [{"label": 4, "box": [0, 0, 1, 1]}]}, "label 4 is none of this model's classes 0 to 3"),
        ("layout", {"layout": [{"label": 1, "box": [0, 0, 2, 1]}]}, "lies outside"),
        ("layout", {"layout": LAYOUT, "tile": True}, "ldm layout2img --tile"),
        ("layout", {"layout": LAYOUT, "prompt": "a circle"}, "prompt: has no effect on this model, which takes layout"),
        ("semantic", {}, "map: this model draws maps"),
        ("semantic", {"map": MAP + 1}, "map: has class 4; this model has classes 0 to 3"),
        ("superres", {}, "image: this model enlarges images"),
        ("superres", {"image": np.zeros((1600, 4, 3), np.uint8)}, "image: would become 3200 x 8 pixels; at most 2048"),
        ("superres", {"image": IMAGE, "mask": HOLE}, "mask: has no effect on this model"),
        ("inpaint", {"image": IMAGE}, "image, mask: this model fills holes"),
        ("inpaint", {"image": IMAGE, "mask": HOLE[:8]}, "mask: the mask is 16x8, its image 16x16"),
        ("inpaint", {"image": IMAGE, "mask": HOLE * 0}, "mask: a mask without a hole"),
        ("retrieval", {}, "choose the number of an item"),
        ("retrieval", {"item": 14}, "item 14: data.params.validation of retrieval has 14"),
        ("autoencoder", {}, "samples need a LatentDiffusion"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_told(tasks, studio, model, order, named):
    files = {name: upload(name, value) for name, value in order.items() if isinstance(value, np.ndarray)}
    job = drawn(studio, tasks[model], **{**order, **files})
    assert job.state == "failed" and named in job.problem and len(job.problem) <= 300 and "\n" not in job.problem
