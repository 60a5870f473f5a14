import json

import numpy as np
import pytest
import torch
import yaml
from picture_files import pixels, png, write_pictures
from PIL import Image

from ldm.cli import doctor
from ldm.doctor.item_sheet import item_sheet
from ldm.doctor.summary import Summary


def main(words):
    return doctor.main(["data", *words])


def write_config(path, params, target="ldm.data.readers.folders.ImageFolder", **sections):
    content = {
        "data": {
            "target": "ldm.data.core.module.DataModule",
            "params": {"batch_size": 2, "train": {"target": target, "params": params}},
        }
    }
    path.write_text(yaml.safe_dump(content | sections))
    return str(path)


def test_counts_shapes_ranges_and_unreadable_files(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 5)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"broken")
    config = write_config(tmp_path / "a.yaml", {"root": "?", "size": 8})
    overrides = [f"data.params.train.params.root={tmp_path / 'pictures'}", "data.params.train.params.size=[8,12]"]
    main(["--base", config, *overrides, "--outdir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "train: ImageFolder, 6 items, 6 read" in printed
    assert "image: [3, 8, 12] float32, -" in printed and "1 files cannot be read" in printed
    with Image.open(tmp_path / "out" / "train.png") as sheet:
        assert sheet.height > 6 * 128


def test_sheet_shows_what_the_network_sees():
    image = torch.full((3, 8, 8), -1.0)
    image[0, 2, 5] = 1
    item = {
        "image": image,
        "segmentation": torch.full((8, 8), 3),
        "mask": -torch.ones(1, 8, 8),
        "low_res": torch.ones(3, 2, 2),
        "boxes": torch.tensor([[0.25, 0.25, 0.5, 0.5], [0, 0, 0, 0]]),
        "box_labels": torch.tensor([4, -1]),
        "many": torch.rand(5, 8, 8),
        "neighbours": torch.rand(4, 768),
        "caption": "кот — a cat " * 20,
        "class_label": 3,
    }
    sheet = np.asarray(item_sheet([item, item]))
    scale, left, top = 16, 4, 16 + 4
    assert sheet[top + 2 * scale + 8, left + 5 * scale + 8].tolist() == [255, 0, 0]
    assert sheet[top + 2 * scale + 8, left + 4 * scale + 8].tolist() == [0, 0, 0]
    assert sheet.shape[0] == 16 + 2 * 128 + 3 * 4 and sheet.shape[1] > 6 * 128


def test_summary_finds_what_is_wrong():
    good = {
        "image": torch.zeros(3, 4, 4),
        "mask": torch.ones(1, 4, 4),
        "segmentation": torch.tensor([[0, -1], [7, 2]]).repeat(2, 2),
        "boxes": torch.rand(2, 4),
        "caption": "words",
        "class_label": 1,
        "neighbours": torch.eye(3),
        "source": {"any": 1},
    }
    summary = Summary()
    summary.add(good)
    assert summary.problems() == [] and len(summary.lines()) == 8
    bad = {
        "image": torch.full((3, 4, 5), 2.0),
        "mask": torch.zeros(1, 4, 4),
        "segmentation": torch.full((2, 4, 4), 0.5),
        "boxes": torch.full((2, 4), float("nan")),
        "caption": "",
        "class_label": -1,
        "neighbours": torch.ones(3, 3),
    }
    summary.add(bad)
    problems = "\n".join(summary.problems())
    for expected in (
        "source: not every item has it",
        "image: should hold values in -1..1, is in 2..2",
        "image: has 2 shapes, which make no batch",
        "mask: should hold -1 and +1 only",
        "segmentation: should hold class indices (H, W), -1 for none",
        "boxes: holds NaN or infinite values in 1 items",
        "class_label: labels must count from 0",
        "neighbours: should hold embeddings of norm 1",
    ):
        assert expected in problems
    assert "1 empty" in "\n".join(summary.lines())


def test_keys_that_the_conditioners_read_must_be_there(tmp_path, capsys):
    write_pictures(tmp_path / "pictures")
    conditioner = {
        "target": "ldm.conditioning.labels.ClassConditioner",
        "params": {"num_classes": 4, "embed_dim": 8},
    }
    config = write_config(tmp_path / "a.yaml", {"root": str(tmp_path / "pictures"), "size": 8}, model=conditioner)
    arguments = ["--base", config, "--outdir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "PROBLEM train: ClassConditioner reads 'class_label', items have image" in printed.out
    assert "error: 1 problem, see above; first train: ClassConditioner" in printed.err.strip().splitlines()[-1]
    (tmp_path / "pictures" / "sub" / "x.png").write_bytes(png(pixels(0)))
    (tmp_path / "pictures" / "a.png").rename(tmp_path / "pictures" / "sub" / "a.png")
    (tmp_path / "pictures" / "c.png").unlink()
    main([*arguments, "data.params.train.params.class_folders=true", "--num", "2"])
    printed = capsys.readouterr().out
    assert "2 read" in printed and "1 classes: sub" in printed and "class_label: number, 0 to 0" in printed


def test_labels_and_sizes_must_go_with_the_model(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        write_pictures(tmp_path / "pictures" / name, 1)
    model = {
        "target": "ldm.conditioning.labels.ClassConditioner",
        "params": {"num_classes": 2, "embed_dim": 8, "null_label": 1},
    }
    params = {"root": str(tmp_path / "pictures"), "size": 8, "class_folders": True}
    config = write_config(tmp_path / "a.yaml", params, model=model)
    with pytest.raises(SystemExit):
        main(["--base", config, "--outdir", str(tmp_path / "out")])
    problems = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert len(problems) == 2 and "class_label: has the class 2, but ClassConditioner takes 0 to 1" in problems[0]
    assert "1 is a class of the data, but means 'no class'" in problems[1]
    main(["--base", config, "--outdir", str(tmp_path / "out"), "model.params={num_classes: 4, null_label: 3}"])


def test_sizes_of_images_must_go_with_a_shipped_model(tmp_path, capsys):
    write_pictures(tmp_path / "pictures")
    roots = [f"data.params.{name}.params.root={tmp_path / 'pictures'}" for name in ("train", "validation")]
    with pytest.raises(SystemExit):
        main(["-b", "configs/autoencoder/kl_f8.yaml", *roots, "data.params.train.params.size=12", "-l", str(tmp_path)])
    (problem,) = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM train" in line]
    assert "image: the size 12x12" in problem and "[16, 16]" in problem


def test_streams(tmp_path, capsys):
    from picture_files import write_tar

    write_tar(tmp_path / "a.tar", range(5))
    params = {"urls": str(tmp_path / "a.tar"), "size": 8}
    config = write_config(tmp_path / "a.yaml", params, "ldm.data.shards.shards.Shards")
    main(["--base", config, "--num", "3", "--outdir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "train: Shards, a stream, 3 read" in printed and "e.g. 'picture 0'" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "absent.yaml"], "no such file"),
        (["--base", "FOLDER/a.yaml", "--num", "-5"], "--num -5: use 1 or more, or 0 for all"),
        (["--base", "FOLDER/empty.yaml"], "there is no section data"),
        (["--base", "FOLDER/a.yaml", "data.params.train.params.rot=x"], "rot: unknown; did you mean root"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    write_config(tmp_path / "a.yaml", {"root": "absent", "size": 8})
    (tmp_path / "empty.yaml").write_text("lightning: {}")
    with pytest.raises(SystemExit) as caught:
        main([word.replace("FOLDER", str(tmp_path)) for word in arguments])
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def written(folder, *images):
    """Write images as 0.png, 1.png ..., each in a folder of its class."""
    for number, (name, array) in enumerate(images):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number}.png").write_bytes(png(array))
    return folder


def test_equal_images_are_counted_and_those_of_training_in_validation_too(tmp_path, capsys):
    a, b, c = (pixels(seed, 8, 8) for seed in range(3))
    train = written(tmp_path / "train", ("ant", a), ("ant", a), ("ant", b), ("bee", a[:, ::-1]))
    (train / "ant" / "broken.png").write_bytes(b"broken")  # another takes its place, which is none that is twice there
    held_out = written(tmp_path / "held", ("ant", c), ("bee", b))
    sections = {"target": "ldm.data.readers.folders.ImageFolder", "params": {"root": str(held_out), "size": 8}}
    params = {"root": str(train), "size": 8, "repeats": 3, "class_folders": True}
    config = write_config(tmp_path / "a.yaml", params)
    words = ["--base", config, f"data.params.validation={json.dumps(sections)}", "--outdir", str(tmp_path / "out")]
    main([*words, "--num", "0", "--html", str(tmp_path / "pages" / "data.html")])
    printed = capsys.readouterr().out
    assert "train: ImageFolder, 15 items, 5 read" in printed
    assert "2 images are equal to an earlier one, or to its mirror image" in printed
    assert "class_label of the items that were read: most often ant 3, bee 2" in printed
    assert "1 of these images are in train, too" in printed
    page = (tmp_path / "pages" / "data.html").read_text()
    assert "1 of these images are in train" in page and page.count('src="data:image/png;base64,') == 2
    assert "http" not in page and "class_label" in page


def test_the_page_is_written_though_something_is_wrong(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 2)
    conditioner = {"target": "ldm.conditioning.labels.ClassConditioner", "params": {"num_classes": 4, "embed_dim": 8}}
    config = write_config(tmp_path / "a.yaml", {"root": str(tmp_path / "pictures"), "size": 8}, model=conditioner)
    words = ["--base", config, "--outdir", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit):
        main(words)
    page = (tmp_path / "page.html").read_text()
    assert "PROBLEM train: ClassConditioner reads &#x27;class_label&#x27;" in page
    with pytest.raises(SystemExit):
        main([*words, "--html", str(tmp_path)])
    assert "--html" in capsys.readouterr().err.splitlines()[-1]
