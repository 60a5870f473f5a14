"""scripts/evaluate.py and compare.py on tiny random models: each kind of thing to measure, two ranks, mistakes."""

import json
import os
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import yaml
from tiny import autoencoder_training_config, node
from tiny_runs import ROOT, diffusion_config, fails, first_stage_config, noise, save, script, write_run

from ldm.cli.evaluate import join_ranks
from ldm.evaluation.conditions import UniformClasses
from ldm.evaluation.image_sets import scaled_folder_images

pytest.importorskip("torch_fidelity")
evaluate, compare = script("evaluate").main, script("compare").main


def scenes(count, **options):
    return node("toy.shapes.Shapes", num_samples=count, size=16, **options)


def with_data(run, **options):
    file = run / "configs" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    sets = {"train": scenes(30, **options), "validation": scenes(24, split="validation", **options)}
    content["data"] = node("data.core.module.DataModule", batch_size=4, **sets)
    file.write_text(yaml.safe_dump(content))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    classes = node("conditioning.labels.ClassConditioner", num_classes=19, embed_dim=16, null_label=18)
    autoencoder = autoencoder_training_config(first_stage_config(), with_discriminator=False)
    return {
        "none": with_data(write_run(root / "none", diffusion_config())),
        "class": with_data(write_run(root / "class", diffusion_config(classes, context_dim=16))),
        "autoencoder": with_data(write_run(root / "autoencoder", autoencoder)),
    }


def arguments(run, out, *more):
    settings = ["--run", run, "--out", out, "--device", "cpu", "--steps", 2, "--batch-size", 5, *more]
    return list(map(str, settings))


def result(out):
    content = json.loads((out / "evaluation.json").read_text())
    return content, content.pop("made")


def test_samples_with_neighbours_and_exported_reference(runs, tmp_path, caplog):
    out, exported = tmp_path / "out", tmp_path / "reference.npz"
    more = ("--n", 20, "--metrics", "frechet", "kernel:size=6", "--neighbours", "--export-reference", exported)
    evaluate(arguments(runs["none"], out, *more))
    content, made = result(out)
    assert set(content["values"]) == {"frechet[scenenet]", "kernel[scenenet]", "kernel_std[scenenet]"}
    assert set(content["intervals"]) == {"frechet[scenenet]", "kernel[scenenet]"} and "   [" in caplog.text
    assert (content["n"], content["seeds"], content["guidance"]) == (20, [0, 19], 1.0)
    assert content["evaluations_per_image"] == 2
    assert content["sampler"] | {"name": "DDIM", "steps": 2, "eta": 0.0} == content["sampler"]
    assert content["model"]["weights"] == "ema" and len(content["model"]["checkpoint_sha256"]) == 64
    assert content["reference"]["count"] == 24 and len(content["reference"]["sha256"]) == 64
    assert set(content["neighbours"]["ratio"]) == {"pixels", "scenenet"}
    assert made["seconds"] > 0 and made["draw_seconds"] > 0 and "torch-fidelity" in made["versions"]
    assert (out / "samples.png").is_file() and (out / "neighbours.png").is_file()
    imported = ("--n", 20, "--metrics", "frechet", "--reference", exported)
    evaluate(arguments(runs["none"], tmp_path / "imported", *imported))
    value = result(tmp_path / "imported")[0]["values"]["frechet[scenenet]"]
    assert value == pytest.approx(content["values"]["frechet[scenenet]"])
    caplog.clear()
    compare([str(out / "evaluation.json")] * 2)
    assert "not distinguishable" in caplog.text


def test_two_ranks_give_the_figures_of_one(runs, tmp_path):
    more = ("--n", 12, "--metrics", "frechet", "precision_recall", "--conditions", "balanced")
    evaluate(arguments(runs["class"], tmp_path / "one", *more))
    job = {"world": 2, "program": "evaluate", "arguments": arguments(runs["class"], tmp_path / "two" / "out", *more)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "distributed" / "forked_runs.py"), json.dumps([job])]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert result(tmp_path / "two" / "out")[0] == result(tmp_path / "one")[0]


def test_a_first_stage_and_that_of_a_diffusion_model(runs, tmp_path):
    metrics = ("--metrics", "frechet", "psnr", "ssim", "inception_score:splits=2", "--n", 10)
    evaluate(arguments(runs["autoencoder"], tmp_path / "a", *metrics))
    evaluate(arguments(runs["none"], tmp_path / "b", "--first-stage", *metrics))
    (noted,) = (runs["autoencoder"] / "evaluations").glob("a-*/evaluation.json")
    assert noted.read_bytes() == (tmp_path / "a" / "evaluation.json").read_bytes()
    assert result(noted.parent)[1]["folder"] == str((tmp_path / "a").resolve())
    first, second = (result(tmp_path / name)[0] for name in "ab")
    assert first["kind"] == second["kind"] == "reconstructions" and first["n"] == 10
    assert {"frechet[scenenet]", "psnr", "psnr_std", "ssim"} <= set(first["values"]) == set(second["values"])


def test_a_folder_of_pictures_and_a_comparison(runs, tmp_path, capsys, caplog):
    for name, seed in (("a", 0), ("b", 10)):
        for index in range(6):
            save(tmp_path / name / f"{index}.png", noise(16, 16, seed=seed + index))
        words = ["--images", tmp_path / name, "--reference", tmp_path / "a", "--device", "cpu"]
        evaluate(list(map(str, [*words, "--metrics", "frechet", "--out", tmp_path / f"{name}.out"])))
    results = [str(tmp_path / f"{name}.out" / "evaluation.json") for name in "ab"]
    assert abs(result(tmp_path / "a.out")[0]["values"]["frechet[scenenet]"]) < 1e-3
    caplog.clear()
    compare(results)
    assert "frechet[scenenet]" in caplog.text and "differs: images" in caplog.text
    alone = ["--images", tmp_path / "a", "--metrics", "inception_score:splits=2", "--device", "cpu"]
    evaluate(list(map(str, [*alone, "--out", tmp_path / "alone"])))  # needs no reference
    save(tmp_path / "b" / "6.png", noise(16, 18))
    words = ["--images", tmp_path / "b", "--reference", tmp_path / "a", "--metrics", "frechet", "--out", tmp_path / "c"]
    assert "images of several sizes" in fails(capsys, evaluate, *words)
    evaluate(arguments(runs["none"], tmp_path / "d", "--n", 6, "--metrics", "frechet"))
    assert "cannot be compared" in fails(capsys, compare, results[0], tmp_path / "d" / "evaluation.json")
    assert "cannot be read" in fails(capsys, compare, results[0], runs["none"] / "configs" / "config.yaml")


def test_uniform_labels_follow_the_seed_and_untrained_guidance_is_told(runs, tmp_path, caplog):
    common = ("--n", 4, "--metrics", "inception_score:splits=2")
    for seed in (None, 7):
        words = (*common, "--conditions", "uniform", *(() if seed is None else ("--seed", seed)))
        evaluate(arguments(runs["class"], tmp_path / f"seed {seed}", *words))
    default, seven = (result(tmp_path / f"seed {seed}")[0] for seed in (None, 7))
    assert (default["seeds"][0], seven["seeds"][0]) == (0, 7)
    labels = UniformClasses("class_label", tuple(range(18)), 7)  # of which the settings are those of the run
    assert (seven["conditions"], seven["conditions_sha256"]) == (labels.name, labels.sha256)
    words = ("--n", 2, "--metrics", "captions_drawn", "layout_iou", "map_iou", "ssim", "--scale", 2)
    evaluate(arguments(runs["class"], tmp_path / "out", *words))
    assert "guidance 2: may harm" in caplog.text
    assert len(result(tmp_path / "out")[0]["conditions_sha256"]) == 64


def test_ranks_wait_longer_than_half_an_hour_for_each_other(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **options: asked.update(options))
    join_ranks("cpu")
    assert asked["timeout"] >= timedelta(days=1)


def test_mistakes_are_one_line_each(runs, tmp_path, capsys):
    for words, message in (
        (("--metrics", "freshet"), "metrics freshet: unknown; did you mean frechet?"),
        (("--metrics", "fid"), "metrics fid: unknown; FID is frechet with the extractor inception"),
        (("--metrics", "CMMD"), "CMMD is mmd with the extractor clip"),
        (("--metrics", "mmd:sigma=0"), "0 is not a positive number"),
        (("--metrics", "mmd:sigma=-1.5"), "-1.5 is not a positive number"),
        (("--metrics", "memorisation_frechet", "--n", 12), "images, not data.params.validation; use train"),
        (("--metrics", "kernel:sise=3"), "sise is unknown; kernel takes subsets, size"),
        (("--metrics", "kernel:size=0"), "0 is not a positive number"),
        (("--metrics", "psnr:a=3"), "psnr takes no options"),
        (("--metrics", "kernel", "--n", 12), "kernel: needs 1000 samples or more, there are 12"),
        (("--extractor", "inseption"), "did you mean inception?"),
        (("--extractor", "inception:weights=no.pth"), "inception: no weights at no.pth; fetch https://"),
        (("--reference", "nowhere"), "reference nowhere: is none of train, validation, test"),
        (("--reference", "test"), "data.params.test: the config has none"),
        (("--n", 0), "--n 0: use 1 or more"),
        (("data.params.validation.params.sise=3",), "unknown; did you mean size?"),
        (("model.params.x=3",), "overrides are data.key=value"),
        (("--batch-size", "-1"), "--batch-size -1: use 1 or more"),
        (("--metrics", "kernel:size=abc"), "size: 'abc' is not a whole number"),
        (("--metrics", "precision_recall:neighbourhood=2.5"), "neighbourhood: 2.5 is not a whole number"),
        (("--metrics", "kernel:size=5", "kernel:size=6"), "metrics kernel:size=6: kernel is asked for twice"),
        (("--metrics", "pathlib.Path"), "pathlib.Path cannot be called"),
        (("--metrics", "ldm.evaluation.image_metrics.psnr", "--n", 12), "cannot be called with images and their batch"),
        (("--metrics", "psnr", "--n", 12), "psnr: needs 'image'"),
        (("--metrics", "psnr", "--neighbours"), "neighbours: are searched by features too"),
        (("--metrics", "psnr", "--export-reference", "a.npz"), "export_reference: no metric needs a reference"),
        (("--export-reference", "a.npz", "--reference", __file__), "is such a file already"),
        (("--conditions", "balanced", "--scale", 2), "scale 2: is not used for a model without conditions"),
        (("--first-stage", "--reference", tmp_path), f"reference {tmp_path}: is not used for a first stage"),
        (("--first-stage", "--reference-n", 3, "--neighbours"), "neighbours, reference_n: is not used"),
        (("--images", tmp_path, "--first-stage", "--scale", 2), "scale 2, first_stage: is not used for images"),
    ):
        assert message in fails(capsys, evaluate, *arguments(runs["none"], tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        evaluate(arguments(runs["none"], tmp_path / "out", "--tile", 16))
    assert "unrecognized arguments: --tile" in capsys.readouterr().err
    fixed = arguments(runs["none"], tmp_path / "out", "--n", 10, "--metrics", "frechet")
    evaluate(fixed)
    assert result(tmp_path / "out")[0]["conditions"] == "none"
    assert "holds another evaluation" in fails(capsys, evaluate, *fixed, "--steps", "3")


def test_a_folder_as_reference_is_read_in_the_range_of_the_training_data(tmp_path):
    save(tmp_path / "a.png", np.full((8, 8), 4095, np.uint16))
    assert scaled_folder_images(str(tmp_path), (8, 8), value_range=[0, 4095]).batch([0])["image"].min() == 1
