"""Data of runs as the network sees them, as values that JSON and a browser can hold."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import node

from ldm.data.core.pixels import to_bytes
from ldm.errors import UserError
from ldm.serve.items import RunData, plain
from ldm.serve.uploads import Upload, indices_of
from ldm.toy.shapes import Shapes


def pixels(address):
    return np.asarray(Image.open(io.BytesIO(Upload.of("image", address))))


def test_an_item_becomes_what_a_page_shows(logs):
    item = Shapes(14, size=16, seed=1)[3]
    page = json.loads(json.dumps(RunData().page(logs / "2-class", "validation", 3, count=1)))
    entries = {entry["key"]: entry for entry in page["items"][0]}
    assert list(entries) == ["image", "caption", "class_label", "boxes", "segmentation"]
    assert np.array_equal(pixels(entries["image"]["png"]), to_bytes(item["image"]).permute(1, 2, 0))
    assert entries["caption"]["text"] == item["caption"]
    label = entries["class_label"]
    assert label["label"] == item["class_label"] and label["name"] in item["caption"]
    known = item["box_labels"] >= 0
    assert [box["box"] for box in entries["boxes"]["boxes"]] == item["boxes"][known].tolist()
    assert np.array_equal(indices_of(Upload.of("map", entries["segmentation"]["levels"])), item["segmentation"])


def test_other_entries():
    item = {
        "low_res": torch.zeros(1, 4, 4), "wide": torch.zeros(5, 4, 4), "neighbours": torch.zeros(2, 192), "number": 3,
        "size": (4, 5), "map": torch.tensor([[-1, 0], [1, 300]]), "scalar": torch.tensor(2.5),
        "array": np.zeros((3, 4, 4)),
        "boxes": torch.tensor([[0.0, 0.0, 0.5, 0.5], [float("nan")] * 4]), "box_labels": torch.tensor([7, 1]),
    }  # fmt: skip
    entries = {entry["key"]: entry for entry in json.loads(json.dumps(plain(item, ["a", "b"])))}
    assert {key: entry["kind"] for key, entry in entries.items()} == {
        "low_res": "image", "wide": "image", "neighbours": "text", "number": "text", "size": "text", "map": "map",
        "scalar": "text", "array": "image", "boxes": "boxes",
    }  # fmt: skip
    assert entries["neighbours"]["text"] == "float32 of shape [2, 192]" and entries["scalar"]["text"] == "2.5"
    assert entries["map"]["levels"] is None  # more classes than a grey image has levels
    assert entries["boxes"]["boxes"] == [{"label": 7, "name": "7", "box": [0.0, 0.0, 0.5, 0.5]}]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (None, "its config has no data.params.train"),
        (node("core.module.DataModule"), "has no data.params.train"),
        ({"params": {"train": {"target": "os.system", "params": {"command": "true"}}}}, "os.system"),
        ({"params": {"train": node("data.readers.folders.ImageFolder", root="absent", size=8)}}, "absent"),
    ],
)
def test_data_that_cannot_be_shown_are_told(logs, tmp_path, data, named):
    run = tmp_path / "run"
    shutil.copytree(logs / "1-none" / "configs", run / "configs")
    content = yaml.safe_load((run / "configs" / "config.yaml").read_text()) | {"data": data}
    (run / "configs" / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=named):
        RunData().page(run, "train", 0)
    with pytest.raises(UserError, match="is it a run folder"):
        RunData().page(tmp_path, "train", 0)


def test_a_data_set_is_built_once(logs):
    data = RunData()
    assert data.item(logs / "2-class", 5)["caption"] == data.item(logs / "2-class", 5)["caption"]
    assert len(data._sets) == 1
    for name in ("1-none", "2-class", "3-text"):
        for split in ("train", "validation"):
            data.page(logs / name, split, 0)
    assert len(data._sets) == 4
    with pytest.raises(UserError, match="item -1"):
        data.item(logs / "2-class", -1)
