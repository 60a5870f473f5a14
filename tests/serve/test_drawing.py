"""Orders: drawn as `model.sample` draws, refused in words, cancelled; the worker outlives what goes wrong."""

import io
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from picture_files import address, png
from PIL import Image
from tiny_runs import noise

from ldm.data.core.pixels import to_bytes
from ldm.errors import UserError
from ldm.models.guidance import Guidance
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling import sampler_names
from ldm.serve.drawing import Studio
from ldm.serve.orders import LIMITS, Order, options_of
from ldm.serve.uploads import Upload


def finished(studio, job, seconds=60):
    end = time.monotonic() + seconds
    while job.state not in ("done", "failed", "cancelled"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize(
    ("run", "order", "conditions"),
    [
        ("1-none", {}, 2),
        ("2-class", {"label": 3, "guidance": 2.0}, [3, 3]),
        ("3-text", {"prompt": "a red circle", "negative": "a green triangle", "guidance": 2.0}, ["a red circle"] * 2),
    ],
)
def test_samples_are_those_of_the_library(logs, studio, run, order, conditions):
    job = finished(studio, studio.submit(logs / run, Order(count=2, steps=2, seed=7, **order)))
    assert (job.state, job.problem, job.done, job.total) == ("done", "", 2, 2)
    more = {"negative": [order["negative"]] * 2} if "negative" in order else {}
    guidance = order.get("guidance", 1.0)
    model = LatentDiffusion.from_pretrained(logs / run)
    images = model.sample(conditions, steps=2, seed=7, guidance=guidance, batch_size=2, **more)
    for content, image in zip(job.images, images, strict=True):
        assert np.array_equal(pixels(content), to_bytes(image).permute(1, 2, 0).numpy())


def image(array):
    return Upload.of("image", address(png(array)))


def test_a_start_image_is_scaled_and_cropped(logs, studio):
    start = image(noise(40, 20))
    job = finished(studio, studio.submit(logs / "1-none", Order(count=1, steps=4, strength=0.5, image=start)))
    assert job.state == "done" and pixels(job.images[0]).shape == (16, 16, 3) and job.total == 2


def test_every_sampler_with_its_options(logs, studio):
    """Each draws, and an option changes what it draws."""
    for name in sampler_names():
        job = finished(studio, studio.submit(logs / "1-none", Order(count=1, steps=2, sampler=name)))
        assert job.state == "done", (name, job.problem)
    assert options_of("heun") == {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0}
    orders = [Order(count=1, steps=2, options=options) for options in ({}, {"eta": 1})]
    one, other = (finished(studio, studio.submit(logs / "1-none", order)).images for order in orders)
    assert one != other


def test_guidance_in_an_interval_and_other_sizes(logs, studio):
    how = {"guidance": 3.0, "interval": (0.2, 0.8), "rescale": 0.5, "height": 8, "width": 24}
    job = finished(studio, studio.submit(logs / "3-text", Order(prompt="a red circle", count=1, steps=4, **how)))
    model = LatentDiffusion.from_pretrained(logs / "3-text")
    guidance = Guidance(3.0, interval=(0.2, 0.8), rescale=0.5)
    (expected,) = to_bytes(model.sample(["a red circle"], steps=4, guidance=guidance, size=(8, 24)))
    assert np.array_equal(pixels(job.images[0]), expected.permute(1, 2, 0))


def test_more_images_than_are_drawn_at_a_time_have_their_own_seeds(logs, studio):
    jobs = [studio.submit(logs / "1-none", Order(count=count, steps=1, seed=seed)) for count, seed in ((6, 3), (1, 8))]
    many, last = (finished(studio, job) for job in jobs)
    assert (many.total, many.done, len(many.images)) == (2, 2, 6)
    assert np.abs(pixels(many.images[5]).astype(int) - pixels(last.images[0])).max() <= 1


def test_images_are_kept_with_what_was_asked_for(logs, tmp_path):
    studio = Studio(torch.device("cpu"), tmp_path)
    order = Order(count=2, steps=1, seed=5, image=image(noise(16, 16)))
    job = finished(studio, studio.submit(logs / "1-none", order))
    assert finished(studio, studio.submit(logs / "1-none", Order(prompt="no text"))).state == "failed"
    studio.stop()
    folder = tmp_path / "1-none"
    kept = [np.asarray(Image.open(folder / "samples" / f"0000{i}.png")) for i in range(2)]
    assert all(np.array_equal(a, pixels(b)) for a, b in zip(kept, job.images, strict=True))
    record = json.loads((folder / "grid-0000.json").read_text())
    assert [sample["seed"] for sample in record["samples"]] == [5, 6] and len(record["order"]["image"]["sha256"]) == 64
    assert not (folder / "grid-0001.json").exists()


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ({"count": 17}, "count: 17"),
        ({"steps": 0}, "steps: 0"),
        ({"prompt": "x" * 10_000}, "prompt: 10000 characters"),
        ({"seed": -1}, "seed: -1"),
        ({"guidance": float("nan")}, "guidance: nan"),
        ({"sampler": "os.system"}, "sampler: choose one of .*ddim"),
        ({"grid": "../x"}, "grid: choose"),
        ({"strength": 0.0}, "strength: 0"),
        ({"height": 4096}, "height: 4096"),
        ({"interval": (0.8, 0.2), "guidance": 2.0}, "interval is 0.8:0.2"),
        ({"rescale": 0.5}, "no effect at scale 1"),
    ],
)
def test_orders_that_are_none(order, named):
    with pytest.raises(UserError, match=named):
        Order(**order)


@pytest.mark.parametrize(
    ("run", "order", "named"),
    [
        ("2-class", {"label": 5}, "classes 0 to 4"),
        ("2-class", {}, "classes 0 to 4"),
        ("1-none", {"prompt": "a circle"}, "prompt: has no effect on this model, which takes image, mask"),
        ("1-none", {"options": {"s_churn": 1}}, "has no s_churn"),
        ("1-none", {"options": {"steps": 3}}, "options: steps is a field of its own"),
        ("1-none", {"options": {"eta": "x"}}, "options: eta: 'x' is not a number"),
        ("1-none", {"height": 9}, "height, width: 9 x 16; this model draws sides that"),
        ("1-none", {"weights": "absent"}, "weights: absent is unknown; choose raw or ema"),
        ("1-none", {"steps": 500}, "500"),
        ("0-broken", {}, "0-broken"),
    ],
)
def test_what_goes_wrong_is_told_and_the_worker_goes_on(logs, studio, run, order, named):
    job = finished(studio, studio.submit(logs / run, Order(**{"count": 1, "steps": 2} | order)))
    assert job.state == "failed" and named in job.problem and "\n" not in job.problem
    assert finished(studio, studio.submit(logs / "1-none", Order(count=1, steps=1))).state == "done"


def test_cancelling_ends_a_job_and_not_the_next(logs, studio):
    long = studio.submit(logs / "1-none", Order(count=16, steps=20, sampler="ddim"))
    waiting = studio.submit(logs / "1-none", Order(count=1, steps=1))
    never = studio.submit(logs / "1-none", Order(count=1, steps=1))
    assert studio.public(never.number)["before"] == 2
    assert studio.cancel(never.number).state == "cancelled"  # at once, as it waits
    studio.cancel(long.number)
    assert finished(studio, long).state == "cancelled" and not long.images
    assert finished(studio, waiting).state == "done"
    assert never.state == "cancelled"


def test_twenty_orders_at_once_are_all_drawn_and_too_many_refused(logs, studio):
    jobs = [studio.submit(logs / "1-none", Order(count=1, steps=1, seed=seed)) for seed in range(20)]
    assert [finished(studio, job).state for job in jobs] == ["done"] * 20
    assert studio.job(jobs[3].number) is jobs[3]
    with pytest.raises(UserError, match="orders are waiting"):
        for _ in range(LIMITS["waiting"] + 2):
            studio.submit(logs / "1-none", Order(count=16, steps=20))
    with pytest.raises(UserError, match="job 999"):
        studio.job(999)


def test_stopping_in_the_middle(logs, studio):
    job = studio.submit(logs / "1-none", Order(count=16, steps=20))
    studio.stop()
    assert finished(studio, job).state == "cancelled"


def test_a_model_is_loaded_once_until_its_file_changes(logs, tmp_path, studio):
    run = tmp_path / "run"
    shutil.copytree(logs / "1-none", run)
    first = studio.loaded(run)
    assert studio.loaded(run) is first and studio.loaded(run, "raw") is not first
    os.utime(run / "checkpoints" / "last.ckpt", (1, 1))
    assert studio.loaded(run) is not first and studio.device == torch.device("cpu")
