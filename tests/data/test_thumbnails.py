"""Neighbours by thumbnails: the most similar pictures, not the picture itself."""

import pytest
import torch

from ldm.errors import UserError
from ldm.toy.shapes import Shapes
from ldm.toy.thumbnails import ThumbnailNeighbours, thumbnail_embeddings


def test_embeddings_have_norm_one_and_ignore_brightness():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = thumbnail_embeddings(images)
    assert embeddings.shape == (4, 192)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(thumbnail_embeddings(images * 0.5 - 0.3), embeddings, atol=1e-5, rtol=0)
    assert not thumbnail_embeddings(torch.ones(1, 3, 32, 32)).any()


def test_neighbours_are_the_most_similar_others_nearest_first():
    scenes = Shapes(60, size=32, fields=())
    data = ThumbnailNeighbours(scenes, scenes, num_neighbours=5)
    table = thumbnail_embeddings(torch.stack([scenes[i]["image"] for i in range(60)]))
    item = data[7]
    similarity = item["neighbours"] @ table[7]
    assert item["neighbours"].shape == (5, 192) and torch.equal(item["image"], scenes[7]["image"])
    expected = (table @ table[7]).sort(descending=True).values[1:6]
    torch.testing.assert_close(similarity, expected)


def test_too_small_a_database_is_a_user_error():
    with pytest.raises(UserError, match="less than the 4 images"):
        ThumbnailNeighbours(Shapes(10), Shapes(4), num_neighbours=4)
