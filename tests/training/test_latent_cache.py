"""The cache of latents on the disk: training from it is training from images, and no cache is taken for another."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import autoencoder_config, latent_diffusion_config, node, run_config, text_config, unet_config
from torch import Tensor

from ldm.autoencoder.regularizers import DiagonalGaussian
from ldm.data.core.derived import DerivedDataset
from ldm.data.core.latents import CachedLatents, LatentFiles, read_null
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError
from ldm.training.latent_cache import LatentCache
from ldm.training.plan import Plan, RunOptions, cache_settings, make_plan
from ldm.training.run import build_data, build_model, encode_plan, train
from ldm.training.run_folder import new_run, resume_run
from ldm.weights import load as checkpoint

COUNT, BATCH, STEPS = 11, 4, 5  # a last batch of the encoding that is not full; steps of three epochs
ROWS = 5


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {('red', 'green')[number % 2]} image {number}")
    return folder


def config(images: Path, cache: Any = None, frozen_text: bool = False, **data: Any) -> dict[str, Any]:
    """Return a training on random crops whose conditions are often dropped."""
    text = text_config(max_length=6, drop_rate=0.5)
    text["params"]["trainable"] = not frozen_text
    parts = unet_config(attention_factors=[1], context_dim=8), autoencoder_config(), text
    options = {"size": 8, "crop": "random", "resize": "size", "flip": 0.5, **data}
    dataset = node("data.readers.captions.CaptionedFolder", root=str(images), **options)
    lightning = {"trainer": {"max_steps": STEPS}, "cache_latents": cache, "callbacks": {"image_logger": None}}
    whole = run_config(latent_diffusion_config(*parts, latent_scale="measure"), dataset, dataset, BATCH, lightning)
    whole["data"]["params"]["validation"] = None
    whole["training"]["allow_untrained_first_stage"] = True
    return whole


def weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.read(run)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def make_cache(tmp_path: Path, content: dict[str, Any]) -> tuple[Plan, LatentCache]:
    """Return the plan and the cache of a config, nothing of which is encoded yet."""
    torch.manual_seed(0)
    plan = make_plan(content, new_run(tmp_path / "logs"))
    data = build_data(plan)
    return plan, LatentCache(plan, build_model(plan, data), data, cache_settings(plan.lightning))


def encode(cache: LatentCache, rank: int = 0, world: int = 1) -> None:
    cache.encode(torch.device("cpu"), rank, world)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("frozen_text", [False, True])
def test_training_from_the_cache_is_training_from_images(images: Path, tmp_path: Path, frozen_text: bool) -> None:
    options = {"frozen_text": frozen_text}
    plain = train(config(images, **options), new_run(tmp_path / "plain")).folder
    cache = {"views": 3, "rows": ROWS, "folder": str(tmp_path / "cache")}
    cached = train(config(images, cache, **options), new_run(tmp_path / "cached")).folder
    assert_equal(weights(plain), weights(cached))
    assert (tmp_path / "cache" / "null.safetensors").exists() == frozen_text


def test_a_run_from_the_cache_goes_on_without_the_files_that_it_once_started_from(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_ALLOW", f"path:{tmp_path}")
    settings = {"views": 3, "rows": ROWS, "folder": str(tmp_path / "cache")}
    whole = train(config(images, settings), new_run(tmp_path / "whole")).folder
    begun = train(config(images, settings), new_run(tmp_path / "begun"), options=RunOptions(max_steps=2)).folder
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    resumed = train(config(images, settings), resume_run(begun)).folder
    assert_equal(weights(whole), weights(resumed))


class Dying(DerivedDataset):
    """Give the items of a data set, and kill the process at item 7."""

    def __getitem__(self, index: SampleKey) -> dict[str, Any]:
        if index.index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dataset[index]

    def _derive(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        return {}


def test_an_encoding_goes_on_after_a_kill(images: Path, tmp_path: Path) -> None:
    settings = {"rows": 3}
    _, whole = make_cache(tmp_path, config(images, settings | {"folder": str(tmp_path / "whole")}))
    encode(whole)
    _, killed = make_cache(tmp_path, config(images, settings | {"folder": str(tmp_path / "killed")}))
    dataset = killed.data.train
    killed.data.train = Dying(dataset)
    child = os.fork()
    if child == 0:
        encode(killed)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = {path: path.stat().st_ino for path in killed.files.folder.glob("latents-*")}
    assert len(before) == 2  # items 0 to 5
    killed.data.train = dataset
    encode(killed)
    assert all(path.stat().st_ino == number for path, number in before.items())
    assert content_of(killed.files.folder) == content_of(whole.files.folder)


def test_ranks_write_disjoint_parts_of_the_files_of_one(images: Path, tmp_path: Path) -> None:
    _, one = make_cache(tmp_path, config(images, {"rows": 2, "folder": str(tmp_path / "one")}))
    encode(one)
    _, two = make_cache(tmp_path, config(images, {"rows": 2, "folder": str(tmp_path / "two")}))
    encode(two, 1, 2)
    assert {path.name[-14:-12] for path in two.files.folder.glob("latents-*")} == {"01", "03", "05"}
    with pytest.raises(UserError, match="latents-00000.* missing"):
        two.finish()
    encode(two, 0, 2)
    assert content_of(one.files.folder) == content_of(two.files.folder)


def test_a_stale_cache_is_refused(images: Path, tmp_path: Path) -> None:
    settings = {"folder": str(tmp_path / "cache")}
    encode(make_cache(tmp_path, config(images, settings))[1])
    images = images.rename(tmp_path / "moved")
    make_cache(tmp_path, config(images, settings))  # moved data are the same
    for named, change in (("transform", {"crop": "center"}), ("transform", {"flip": 0.0}), ("views", {})):
        views = {"views": 2} if named == "views" else {}
        with pytest.raises(UserError, match=f"cache: is the cache of other {named}; delete it"):
            make_cache(tmp_path, config(images, settings | views, **change))
    for name in ("03.txt", "03.png"):  # of another size
        before = (images / name).read_bytes()
        (images / name).write_bytes(before + b" ")
        with pytest.raises(UserError, match="cache: is the cache of other data; delete it"):
            make_cache(tmp_path, config(images, settings))
        (images / name).write_bytes(before)


def test_a_cache_of_another_encoder_is_refused(images: Path, tmp_path: Path) -> None:
    settings = {"folder": str(tmp_path / "cache")}
    plan, cache = make_cache(tmp_path, config(images, settings))
    encode(cache)
    training = build_model(plan, cache.data)  # other random weights
    with pytest.raises(UserError, match="other first stage; delete"):
        LatentCache(plan, training, cache.data, cache.settings)


def test_what_has_no_rows_of_equal_shape_is_refused(images: Path, tmp_path: Path) -> None:
    content = config(images, True)
    train = content["data"]["params"]["train"]
    content["data"]["params"]["train"] = node("data.core.buckets.Bucketed", dataset=train, multiple=2, least=1)
    with pytest.raises(UserError, match="lightning.cache_latents: images in shapes of their own"):
        make_cache(tmp_path, content)


def test_a_damaged_or_foreign_file_is_refused_by_name(images: Path, tmp_path: Path) -> None:
    settings = {"rows": ROWS, "folder": str(tmp_path / "cache")}
    _, cache = make_cache(tmp_path, config(images, settings))
    encode(cache)
    _, other = make_cache(tmp_path, config(images, settings | {"folder": str(tmp_path / "other")}, crop="center"))
    encode(other)
    path = cache.files.path(1)
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", other.files.path(1).read_bytes(), cache.files.path(2).read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="latents-00001.*delete it"):
            cache.files.missing()
    cache.files.index.write_text("{")
    with pytest.raises(UserError, match="cache.json.*damaged; delete"):
        make_cache(tmp_path, config(images, settings))


@pytest.mark.parametrize("frozen_text", [False, True])
def test_a_flipped_bit_of_a_cache_is_found_wherever_it_is(images: Path, tmp_path: Path, frozen_text: bool) -> None:
    _, cache = make_cache(tmp_path, config(images, {"folder": str(tmp_path / "cache")}, frozen_text))
    encode(cache)
    paths, read = [cache.files.path(0)], lambda: [CachedLatents(cache.files)[i] for i in range(COUNT)]
    if frozen_text:
        paths.append(cache.files.null)
    for path in paths:
        whole, found = path.read_bytes(), 0
        for place in np.random.default_rng(0).choice(len(whole), 60, replace=False):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(place) % 8
            path.write_bytes(flipped)
            try:
                cache.files.missing()
                read()
                read_null(cache.files)
            except UserError as error:
                assert str(path) in str(error) and "delete it" in str(error)
                found += 1
            else:  # only what the header says of the statistics
                assert place < 8 + int.from_bytes(whole[:8], "little")
        assert found > 40
        path.write_bytes(whole)
    assert len(read()) == COUNT


def test_statistics_are_those_of_all_latents_in_float64(images: Path, tmp_path: Path) -> None:
    folder = encode_plan(make_plan(config(images), new_run(tmp_path / "logs")))
    assert folder.parent == tmp_path / "outputs" / "latents"
    files = json.loads((folder / "cache.json").read_text())
    dataset = CachedLatents(LatentFiles(folder, folder.name, COUNT))
    posterior = DiagonalGaussian(torch.stack([dataset[i]["moments"] for i in range(COUNT)]).double())
    mean, var = posterior.mean.numpy(), posterior.var.numpy()
    np.testing.assert_allclose(files["statistics"]["mean"], mean.mean((0, 2, 3)), rtol=1e-10)
    expected = np.sqrt(mean.var((0, 2, 3)) + var.mean((0, 2, 3)))
    np.testing.assert_allclose(files["statistics"]["std"], expected, rtol=1e-10)


def test_rows_are_read_lazily_and_views_follow_epochs(images: Path, tmp_path: Path) -> None:
    _, cache = make_cache(tmp_path, config(images, {"rows": 2, "views": 2, "folder": str(tmp_path / "cache")}))
    encode(cache)
    dataset = CachedLatents(cache.files)
    items = [dataset[SampleKey(3, epoch)] for epoch in range(3)]
    assert len(dataset._open) == 2 and items[0]["caption"] == "a green image 3"
    assert torch.equal(items[0]["moments"], items[2]["moments"])
    assert not torch.equal(items[0]["moments"], items[1]["moments"])
