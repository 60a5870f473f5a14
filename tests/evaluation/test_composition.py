"""The judge of unseen pairs: what is right by definition, features of drawings, and the files that it writes."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from ldm.conditioning.text import TextConditioner
from ldm.conditioning.tokenizers import TrainedTokenizer
from ldm.data.shards.shards import IndexedShards
from ldm.errors import UserError
from ldm.evaluation.build import build_from_spec, known_names
from ldm.evaluation.composition import Gallery, Label, shares_right
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.shape_colour import ShapeColour, oriented_gradients
from ldm.toy.emoji_styles import Pairs, judge
from ldm.toy.runs import Sampling

COLOURS = {"warm": "#e05020", "cool": "#2050d0"}
CONCEPTS = ("circle", "square", "bar", "cross", "ring", "corner")


def draw(concept: str, style: str, shift: int = 0, side: int = 64) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    pen, colour = ImageDraw.Draw(image), COLOURS[style]
    a, b = 12 + shift, 52 + shift
    if concept in ("circle", "ring"):
        pen.ellipse((a, a, b, b), fill=colour if concept == "circle" else None, outline=colour, width=6)
    elif concept == "square":
        pen.rectangle((a, a, b, b), fill=colour)
    elif concept == "corner":
        pen.polygon([(a, a), (b, b), (a, b)], fill=colour)
    else:
        pen.rectangle((a, 28 + shift, b, 36 + shift), fill=colour)
        if concept == "cross":
            pen.rectangle((28 + shift, a, 36 + shift, b), fill=colour)
    return image.resize((side, side))


def as_bytes(images: list[Image.Image]) -> torch.Tensor:
    return (
        torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
        .view(len(images), 64, 64, 3)
        .permute(0, 3, 1, 2)
    )


def test_ranks_are_those_of_the_asked_style() -> None:
    labels = [Label("a", "x"), Label("b", "x"), Label("c", "x"), Label("b", "y")]
    gallery = Gallery(torch.tensor([[0.0], [1.0], [3.0], [0.1]]), labels)
    asked = [Label("b", "x"), Label("b", "y"), Label("c", "x"), Label("b", "x")]
    ranks = gallery.ranks(torch.tensor([[0.1], [0.0], [0.0], [0.6]]), asked)
    assert ranks.tolist() == [1, 0, 2, 0]
    assert shares_right(ranks, (1, 2)) == {1: 0.5, 2: 0.75}
    assert gallery.nearest(torch.tensor([[0.2]]))[1].tolist() == [3]
    with pytest.raises(UserError, match="'a' in the style 'y': no real image shows it"):
        gallery.ranks(torch.zeros(1, 1), [Label("a", "y")])


def test_features_tell_concepts_apart_whatever_the_style() -> None:
    labels = [Label(concept, style) for style in COLOURS for concept in CONCEPTS]
    extractor = build_from_spec("shape_colour", known_names("EXTRACTORS"), "--extractor")
    gallery = Gallery(extractor(as_bytes([draw(*label) for label in labels])).pooled, labels)
    assert gallery.between_styles() == {"cool as warm": 1.0, "warm as cool": 1.0}
    moved = extractor(as_bytes([draw(*label, shift=2) for label in labels])).pooled
    assert gallery.ranks(moved, labels).max() == 0
    assert torch.equal(
        extractor(as_bytes([draw("bar", "cool")])).pooled, gallery.features[labels.index(("bar", "cool"))][None]
    )


def test_gradients_by_place_and_direction() -> None:
    ramp = torch.linspace(0, 1, 16).expand(16, 16)
    for image, direction in ((ramp, 0), (ramp.T, 4), (-ramp, 0), ((ramp + ramp.T), 2)):
        found = oriented_gradients(image[None], cells=2, bins=8)
        assert found.shape == (1, 8, 2, 2)
        assert found[0].flatten(1).sum(1).argmax() == direction and found[0, direction].std() < 1e-3
    between = oriented_gradients(
        (torch.cos(torch.tensor(0.2)) * ramp + torch.sin(torch.tensor(0.2)) * ramp.T)[None], 1, 8
    )
    torch.testing.assert_close(between.sum(), torch.tensor(1 / 15), rtol=1e-4, atol=0)


@contextmanager
def silent(count: int, title: str) -> Any:
    class Bar:
        def update(self, number: int = 1) -> None: ...

    yield Bar()


def shards(path: Path, labels: list[Label]) -> Path:
    with tarfile.open(path, "w") as archive:
        for label in labels:
            buffer = io.BytesIO()
            draw(*label, side=8).save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "txt": ", ".join(label).encode()}
            members["json"] = json.dumps(label._asdict()).encode()
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{'_'.join(label)}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_a_model_is_judged_and_shown(tmp_path: Path) -> None:
    labels = [Label(concept, style) for style in COLOURS for concept in CONCEPTS]
    fields = {"caption": "txt", "concept": "json.concept", "style": "json.style"}
    sets = [
        IndexedShards(shards(tmp_path / f"{name}.tar", part), 8, fields)
        for name, part in (("train", labels[2:]), ("val", labels[:2]))
    ]
    tokenizer = TrainedTokenizer(max_length=8, vocab_size=64)
    tokenizer.fit([", ".join(label) for label in labels])
    text = TextConditioner(tokenizer, dim=tiny.WIDTH, depth=1)
    network = tiny.unet(attention_factors=[1], context_dim=tiny.WIDTH)
    model = tiny.latent_diffusion(network, tiny.autoencoder(), text).model.eval()
    train, held_out = (ImageSet(dataset, name) for dataset, name in zip(sets, ("train", "val"), strict=True))
    pairs = Pairs(ImageSet(sets[1], "val"), train, held_out)
    found = judge(model, pairs, tmp_path / "out", Sampling(2, 2.0, sampler="ddim"), ShapeColour(), silent)
    assert json.loads((tmp_path / "out" / "judged.json").read_text()).keys() == found.keys()
    assert found["pairs"] == 2 and found["real images"] == 12 and found["right"].keys() == {1, 5}
    assert 0 <= found["right"][1] <= found["right"][5] <= 1
    for name, size in (("pairs.png", (32, 8)), ("neighbours.png", (16, 24))):
        assert Image.open(tmp_path / "out" / name).size == size
    bare = ImageSet(IndexedShards(tmp_path / "val.tar", 8), "val")
    with pytest.raises(UserError, match="val: items have no concept, style; set its fields"):
        judge(model, Pairs(bare, train, held_out), tmp_path / "no", Sampling(2), ShapeColour(), silent)
