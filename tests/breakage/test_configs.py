"""No door that reads a config runs what a stranger wrote there, and all that it says of it is one short line."""

import copy
import itertools
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from breakage.configs import PLACES, PLACES_OF_TRAINING, hostile_nodes, hostile_texts, placed
from prove_configs import at, places

from ldm.cli import doctor, evaluate, reconstruct, sample, train
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.saving import export_run

Config = dict[str, Any]
HELPER = "left_by_a_stranger"
ON_CPU = ["--accelerator", "cpu", "--devices", "1"]


def config() -> Config:
    """Return a config of an unconditional model and its data."""
    training = tiny.latent_diffusion_config(tiny.unet_config(), tiny.autoencoder_config())
    data = tiny.node("toy.shapes.Shapes", num_samples=8, size=tiny.SIZE, fields=[])
    return tiny.run_config(training, data, data)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of a run that a stranger sent, with a module beside its config and in the working folder."""
    run = tmp_path / "run"
    for folder in ("configs", "checkpoints"):
        (run / folder).mkdir(parents=True)
    torch.save({"state_dict": {}}, run / "checkpoints" / "last.ckpt")
    code = f"open({str(canary(run))!r}, 'w')\nclass Thing: ...\ndef make() -> Thing: ...\n"
    for folder in (run, run / "configs", tmp_path):
        (folder / f"{HELPER}.py").write_text(code)
        (folder / f"{HELPER}.pickle").write_bytes(pickle.dumps(Touch(str(canary(run)))))
    monkeypatch.chdir(tmp_path)
    return run


class Touch:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def canary(run: Path) -> Path:
    return run.parent / "canary"


def config_file(run: Path) -> str:
    return str(run / "configs" / "config.yaml")


def safetensors(run: Path) -> None:
    """Load a file that has the config inside of it."""
    from safetensors.torch import save_file

    file = str(run / "model.safetensors")
    save_file({"a": torch.zeros(1)}, file, {"config": Path(config_file(run)).read_text()})
    LatentDiffusion.from_pretrained(file)


def words(run: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--device", "cpu", *more]


DOORS: dict[str, Callable[[Path], Any]] = {
    "dry run": lambda run: train.main(["--base", config_file(run), "--dry-run", *ON_CPU]),
    "sample": lambda run: sample.main(words(run, "--n_samples", "1")),
    "sample --config": lambda run: sample.main(
        ["--config", config_file(run), "--ckpt", str(run / "checkpoints" / "last.ckpt"), "--device", "cpu"]
    ),
    "evaluate": lambda run: evaluate.main(words(run, "--out", str(run / "out"))),
    "reconstruct": lambda run: reconstruct.main(words(run, "--indir", str(run), "--outdir", str(run / "out"))),
    "from_pretrained": lambda run: LatentDiffusion.from_pretrained(run),
    "a file with its config": safetensors,
    "export": lambda run: export_run(run, run / "out.safetensors"),
}
DOORS_OF_TRAINING: dict[str, Callable[[Path], Any]] = {
    "resume": lambda run: train.main(["-t", "-r", str(run), *ON_CPU]),
    "dry run": DOORS["dry run"],
    "doctor data": lambda run: doctor.main(["data", "--base", config_file(run), "--outdir", str(run / "out")]),
    "doctor config": lambda run: doctor.main(["config", str(run)]),
}


def refusal(door: Callable[[Path], Any], run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a door says when it refuses a run, one line; empty if it does not refuse."""
    from ldm.errors import UserError

    capsys.readouterr()
    try:
        door(run)
    except SystemExit as end:
        assert end.code == 1
        said = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
        assert said.startswith("error: ")
        said = said.removeprefix("error: ")
    except UserError as error:
        said = str(error)
    else:
        return ""
    assert said.isprintable() and len(said) <= 300
    return said


def nodes(run: Path) -> list[Config]:
    return list(hostile_nodes(canary(run), run / f"{HELPER}.py"))


def test_no_node_is_called_at_any_door(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(door, place) for door in DOORS if door not in ("export", "dry run") for place in PLACES]
    for index, node in enumerate(nodes(world)):
        name, place = pairs[index % len(pairs)]
        content = placed(config(), place, node)
        Path(config_file(world)).write_text(yaml.safe_dump(content))
        said = refusal(DOORS[name], world, capsys)
        assert not canary(world).exists(), (node, place, name)
        assert said or name == "reconstruct", (node, place, name)  # which builds the first stage alone
    assert index >= 60


def test_nor_where_a_run_goes_on(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spots = [place for place in PLACES_OF_TRAINING if place != "metric"]
    for index, node in enumerate(nodes(world)[::4]):
        place = spots[index % len(spots)]
        Path(config_file(world)).write_text(yaml.safe_dump(placed(config(), place, node)))
        said = refusal(DOORS_OF_TRAINING["resume"], world, capsys)
        assert said and not canary(world).exists(), (node, place)


@pytest.mark.proof
def test_all_nodes_at_all_places_by_turns_at_all_doors(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = 0
    for doors, spots in ((DOORS, PLACES), (DOORS_OF_TRAINING, PLACES_OF_TRAINING)):
        turns = itertools.cycle(doors)
        for place, node in itertools.product(spots, nodes(world)):
            name = next(turns)
            if HELPER in node["target"] and name in ("dry run", "doctor data"):
                continue  # there the module of the working folder may be named
            Path(config_file(world)).write_text(yaml.safe_dump(placed(config(), place, node)))
            refusal(doors[name], world, capsys)
            assert not canary(world).exists(), (node, place, name)
            pairs += 1
    assert pairs > 1000


@pytest.mark.parametrize("spec", ["os.system", "subprocess.Popen:args=[touch, {canary}]", f"{HELPER}.make"])
def test_metrics_of_a_config_are_targets_too(spec: str, world: Path) -> None:
    from ldm.errors import UserError
    from ldm.evaluation.build import make_metric_suite

    with pytest.raises(UserError, match=spec.partition(".")[0]):
        make_metric_suite([spec.replace("{canary}", str(canary(world)))], "scenenet", torch.device("cpu"), keep=0)
    assert not canary(world).exists()


@pytest.mark.parametrize("name", hostile_texts())
def test_a_hostile_text_is_one_line_at_every_door(name: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config_file(world)).write_text(hostile_texts()[name], encoding="utf-8")
    for door in ("dry run", "sample", "a file with its config"):
        if not (door == "a file with its config" and "base" in name):
            assert refusal(DOORS[door], world, capsys), door
    said = refusal(DOORS_OF_TRAINING["resume"], world, capsys)
    assert said


@pytest.mark.parametrize("door", ["sample", "reconstruct", "evaluate", "from_pretrained", "export"])
def test_a_run_of_another_form_is_one_line(door: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = config()
    some = [place for place, _ in places(content) if len(place) < 4 or place[-1] in ("size", "autoencoder", "params")]
    pairs = list(itertools.product(some, (3, [1], "x", None, {"target": "ldm.networks.unet.UNet"})))
    for place, value in random.Random(door).sample(pairs, 20):
        changed = copy.deepcopy(content)
        at(changed, place[:-1])[place[-1]] = value
        Path(config_file(world)).write_text(yaml.safe_dump(changed))
        refusal(DOORS[door], world, capsys)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: None])
def test_what_is_no_file_is_one_line(make: Callable[[str], None], world: Path, capsys) -> None:
    make(config_file(world))
    for doors, name in ((DOORS, "dry run"), (DOORS, "sample"), (DOORS_OF_TRAINING, "resume")):
        assert refusal(doors[name], world, capsys), name
