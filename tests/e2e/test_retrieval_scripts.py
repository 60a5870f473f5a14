"""build_retrieval and knn2img: a folder to a database, and its neighbours to pictures, with a tiny random CLIP."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from picture_files import write_pictures
from PIL import Image
from tiny import identity_config, latent_diffusion_config, node, unet_config
from tiny_runs import fails, script

from ldm.conditioning.clip import ClipEmbedder
from ldm.config import instantiate
from ldm.data.readers.embeddings import Database
from ldm.errors import UserError

WIDTH = 12  # of the embeddings


build_retrieval, knn2img = script("build_retrieval").main, script("knn2img").main


@pytest.fixture(scope="module")
def clip(clip_folder, tmp_path_factory):
    """Give a folder with both models of CLIP and the tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig

    folder = tmp_path_factory.mktemp("whole_clip")
    AutoTokenizer.from_pretrained(clip_folder).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig.from_pretrained(clip_folder).to_dict()
    vision = {**small, "image_size": 16, "patch_size": 8, "projection_dim": WIDTH}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, "projection_dim": WIDTH}, vision_config=vision, projection_dim=WIDTH)
    CLIPModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    network = unet_config(3, attention_factors=[1], context_dim=WIDTH)
    conditioner = node("conditioning.text.EmbeddingConditioner", key="neighbours", dim=WIDTH)
    model = latent_diffusion_config(network, identity_config(), conditioner, num_steps=10, ema_decay=None)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.manual_seed(0)
    built = instantiate(model)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.detach(), std=0.1)
    torch.save({"state_dict": built.state_dict()}, folder / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def database(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("database")
    write_pictures(folder / "in", count=5)
    (folder / "in" / "bad.png").write_bytes(b"no picture")
    build(folder / "in", folder / "mine.npz", clip, "--batch-size", 2)
    return folder / "mine.npz"


def build(indir, out, clip, *arguments):
    settings = ["--indir", indir, "--out", out, "--clip", clip, "--device", "cpu", *arguments]
    build_retrieval(list(map(str, settings)))


def draw(run, clip, out, *arguments):
    settings = ["--run", run, "--clip", clip, "--outdir", out, "--device", "cpu", "--steps", 2, "--H", 8, "--W", 8]
    knn2img(list(map(str, [*settings, *arguments])))
    written = json.loads(sorted(out.glob("grid-*.json"))[-1].read_text())
    return [np.asarray(Image.open(out / entry["file"])) for entry in written["samples"]], written["samples"]


def test_a_database_of_a_folder(database):
    read = Database.load(database)
    assert [Path(path).name for path in read.paths] == ["a.png", "c.png", "e.png", "b.png", "d.png"]
    assert read.embeddings.shape == (5, WIDTH)
    torch.testing.assert_close(read.embeddings.norm(dim=-1), torch.ones(5))


def test_embeddings_see_pictures_and_words(clip):
    embedder = ClipEmbedder(str(clip))
    images = [torch.rand(3, 20, 30) * 2 - 1, torch.rand(3, 16, 16) * 2 - 1]
    both, one = embedder.embed_images(images), embedder.embed_images(images[1:])
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    squares = [embedder.square(image) for image in images]
    assert [square.shape for square in squares] == [(3, 16, 16)] * 2  # what is kept of pictures, however large
    assert torch.equal(embedder.embed_squares(torch.stack(squares)), both)
    texts = embedder.embed_texts(["a red circle", "a blue square"])
    assert texts.shape == (2, WIDTH) and not torch.allclose(texts[0], texts[1], atol=1e-3)


def test_the_neighbours_of_a_picture_and_of_a_text(run, clip, database, tmp_path):
    image = database.parent / "in" / "sub" / "b.png"
    images, samples = draw(run, clip, tmp_path / "a", "--database", database, "--image", image, "--knn", 2, "-n", 2)
    assert images[0].shape == (8, 8, 3) and len(images) == 2 and not np.array_equal(*images)
    assert samples[0]["neighbours"][0]["path"] == str(image)
    assert samples[0]["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    common = ("--prompt", "a red circle", "-n", 1)
    plain, _ = draw(run, clip, tmp_path / "b", *common, "--skip_grid")
    assert not list((tmp_path / "b").glob("*.png"))
    near, noted = draw(run, clip, tmp_path / "c", *common, "--database", database, "--knn", 3)
    both, _ = draw(run, clip, tmp_path / "d", *common, "--database", database, "--knn", 3, "--use_neighbors")
    assert len(noted[0]["neighbours"]) == 3 and noted[0]["caption"] == "a red circle"
    assert not np.array_equal(plain[0], near[0]) and not np.array_equal(near[0], both[0])


def test_published_names(run, clip, database, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "rdm" / "retrieval_databases" / "mine"
    folder.mkdir(parents=True)
    (folder / "part_1.npz").write_bytes(database.read_bytes())
    monkeypatch.chdir(tmp_path)
    images, samples = draw(run, clip, tmp_path / "out", "--prompt", "two", "--database", "mine", "--knn", 5)
    assert len(images) == 3 and len(samples[0]["neighbours"]) == 5


def test_the_published_model_is_found(run, clip, tmp_path, monkeypatch, capsys):
    settings = ["--clip", clip, "--outdir", tmp_path / "out", "--device", "cpu", "--steps", 2, "--H", 8, "--W", 8]
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, knn2img, *settings, "--prompt", "a")
    assert "https://ommer-lab.com/files/rdm/model.ckpt and put it at models/rdm/rdm768x768/model.ckpt" in message
    for source, place in [
        ("config.yaml", "configs/retrieval-augmented-diffusion/768x768.yaml"),
        ("last.ckpt", "models/rdm/rdm768x768/model.ckpt"),
    ]:
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(run / source)
    knn2img(list(map(str, [*settings, "--prompt", "a", "-n", 1])))
    assert (tmp_path / "out" / "samples" / "00000.png").is_file()


def test_mistakes_are_one_line(run, clip, database, tmp_path, capsys):
    out = ("--outdir", tmp_path / "out", "--device", "cpu", "--steps", 2, "--clip", clip, "--H", 8, "--W", 8)
    for arguments, message in [
        ((), "no query: give one of"),
        (("--prompt", "a", "--image", "b"), "no query: give one of"),
        (("--prompt", "a", "--use_neighbors"), "none without --database"),
        (("--prompt", "a", "--database", tmp_path / "no.npz"), "no database"),
        (("--prompt", "a", "--database", database, "--knn", 6), "6 neighbours asked for; the database has 5"),
        (("--prompt", "a", "--clip", tmp_path), "the folder lacks files"),
    ]:
        assert message in fails(capsys, knn2img, "--run", run, *out, *arguments)
    common = ("--indir", database.parent / "in", "--clip", clip, "--device", "cpu")
    assert "ends in .npz" in fails(capsys, build_retrieval, *common, "--out", tmp_path / "a.zip")
    common = ("--indir", database.parent / "in", "--out", tmp_path / "a.npz", "--device", "cpu")
    assert "is not on this machine" in fails(capsys, build_retrieval, *common, "--clip", "nobody/nothing")


def test_half_a_clip_is_refused(clip_folder):
    with pytest.raises(UserError, match="has no weights for text_projection"):
        ClipEmbedder(str(clip_folder)).embed_texts(["a red circle"])
