import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.readers.embeddings import Database
from ldm.data.readers.neighbours import RetrievalFolder
from ldm.errors import UserError

ANGLES = {"a.png": 0.0, "b/c.png": 10.0, "d.png": 25.0, "e.png": 180.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ANGLES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def database(folder: Path, **changes: np.ndarray) -> Path:
    radians = np.deg2rad(list(ANGLES.values()))
    embedding = 3 * np.stack([np.cos(radians), np.sin(radians)], 1)
    content = {"embedding": embedding, "path": np.array([str(folder / name) for name in ANGLES])}
    np.savez(folder / "database.npz", **(content | changes))
    return folder / "database.npz"


def test_it_reads_what_the_script_writes(folder: Path) -> None:
    paths = [str(folder / name) for name in ANGLES]
    Database(torch.nn.functional.normalize(torch.randn(4, 6), dim=1), paths).save(folder / "made" / "it.npz")
    assert RetrievalFolder(folder, 8, folder / "made" / "it.npz", 3)[0]["neighbours"].shape == (3, 6)


def test_neighbours_are_the_most_similar_others_nearest_first(folder: Path) -> None:
    data = RetrievalFolder(folder, 8, database(folder), num_neighbours=2)
    degrees = [np.rad2deg(np.arctan2(item["neighbours"][:, 1], item["neighbours"][:, 0])) for item in data]
    np.testing.assert_allclose(degrees, [[10, 25], [0, 25], [10, 0], [25, 10]], atol=1e-3)
    torch.testing.assert_close(data[0]["neighbours"].norm(dim=1), torch.ones(2))
    assert data[0]["neighbours"].dtype == torch.float32 and data[0]["image"].shape == (3, 8, 8)


def test_copies_stand_before_the_image_itself(folder: Path) -> None:
    embedding = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    data = RetrievalFolder(folder, 8, database(folder, embedding=embedding), num_neighbours=1)
    assert [item["neighbours"].tolist() for item in data] == [[[1.0, 0.0]]] * 4
    assert all(int(others) != row for row, others in enumerate(data._neighbours[:3]))


def test_it_searches_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Database, "nearest", _counted(Database.nearest, asked))
    data = RetrievalFolder(folder, 8, database(folder), num_neighbours=2, index="exact")
    assert [len(list(data)) for _ in range(2)] == [4, 4] and asked == [(4, "exact")]


def _counted(nearest: Callable, asked: list) -> Callable:
    def counted(self: Database, queries: torch.Tensor, count: int, index: str) -> tuple:
        asked.append((len(queries), index))
        return nearest(self, queries, count, index)

    return counted


def test_images_that_the_database_lacks_are_left_out_and_named(folder: Path, caplog: Any) -> None:
    (folder / "b" / "bad.png").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        data = RetrievalFolder(folder, 8, database(folder), num_neighbours=2)
    assert data.names == list(ANGLES) and len(data) == 4
    degrees = [np.rad2deg(np.arctan2(item["neighbours"][:, 1], item["neighbours"][:, 0])) for item in data]
    np.testing.assert_allclose(degrees, [[10, 25], [0, 25], [10, 0], [25, 10]], atol=1e-3)
    (record,) = caplog.records
    assert "lacks 1 of the 5 images" in record.getMessage() and "first b/bad.png" in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "num_neighbours", "message"),
    [
        ({"path": np.array(["a.png", "b", "c", "d"])}, 2, "lacks 4 of the 4 .*a.png; make it again"),
        ({"path": np.array(["a.png", "b.png", "c.png"])}, 2, "database.npz: .* do not fit 3 paths"),
        ({}, 4, "has 4 images; num_neighbours=4"),
        ({"embedding": np.zeros((4, 2))}, 2, "database.npz: some embeddings are zero"),
    ],
)
def test_bad_databases_are_refused(folder: Path, changes: dict, num_neighbours: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetrievalFolder(folder, 8, database(folder, **changes), num_neighbours)


def test_other_files_are_no_databases(folder: Path) -> None:
    with pytest.raises(UserError, match="a.png: is no .npz file"):
        RetrievalFolder(folder, 8, folder / "a.png")
    with pytest.raises(UserError, match="absent.npz: no database"):
        RetrievalFolder(folder, 8, folder / "absent.npz")
