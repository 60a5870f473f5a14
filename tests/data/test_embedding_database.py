"""Databases of embeddings: exact neighbours, files of both kinds, and mistakes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data.readers import embeddings
from ldm.data.readers.embeddings import Database
from ldm.errors import UserError


@pytest.fixture
def database():
    torch.manual_seed(0)
    return Database(F.normalize(torch.randn(50, 8), dim=-1), [f"{i}.png" for i in range(50)])


def test_neighbours_are_the_most_similar_first(database, monkeypatch):
    queries = torch.randn(3, 8)
    cosine = F.cosine_similarity(queries[:, None], database.embeddings[None], dim=-1)
    expected = cosine.topk(4, dim=1)
    for chunk, some in ((50, 64), (7, 64), (7, 2)):  # how many are compared at a time changes nothing
        monkeypatch.setattr(embeddings, "_CHUNK", chunk)
        monkeypatch.setattr(embeddings, "_QUERIES", some)
        indices, similarities = database.nearest(queries, 4)
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(similarities, expected.values)


def test_an_entry_is_its_own_neighbour(database):
    indices, similarities = database.nearest(3 * database.embeddings[[7]], 1)
    assert indices.item() == 7 and similarities.item() == pytest.approx(1)


def test_faiss_finds_the_same(database):
    pytest.importorskip("faiss")
    queries = torch.randn(3, 8)
    assert torch.equal(database.nearest(queries, 4)[0], database.nearest(queries, 4, "faiss")[0])


def test_files_of_both_kinds(database, tmp_path):
    database.save(tmp_path / "sub" / "mine.npz")
    read = Database.load(tmp_path / "sub" / "mine.npz")
    assert read.paths == database.paths
    torch.testing.assert_close(read.embeddings, database.embeddings)
    published = {"embedding": np.full((2, 8), 3.0, np.float16), "img_id": np.array([7, 8]), "patch_coords": np.zeros(2)}
    np.savez(tmp_path / "sub" / "theirs.npz", **published)
    both = Database.load(tmp_path / "sub")
    assert both.paths == [*database.paths, "7", "8"]
    torch.testing.assert_close(both.embeddings.norm(dim=-1), torch.ones(52))


def test_mistakes(database, tmp_path):
    with pytest.raises(UserError, match="51 neighbours asked for; the database has 50"):
        database.nearest(torch.randn(1, 8), 51)
    with pytest.raises(UserError, match="the query has 4 numbers, the database 8"):
        database.nearest(torch.randn(1, 4), 1)
    with pytest.raises(UserError, match="no database"):
        Database.load(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no .npz file"):
        Database.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", vectors=np.zeros(3))
    with pytest.raises(UserError, match="holds vectors; a database has"):
        Database.load(tmp_path / "b.npz")
    with pytest.raises(UserError, match="do not fit 0 paths"):
        Database(torch.zeros(0, 8), [])
