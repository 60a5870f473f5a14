"""Released files of DiT, SiT and LightningDiT, which hold a network alone, give it to whole models."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import autoencoder_config, latent_diffusion_config, node, sections_of, unet_config
from torch import Tensor

from ldm.cli.sample import main as sample
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource, load_model
from ldm.networks.dit import DiT
from ldm.training.run import instantiate_training
from ldm.weights.load import read

SIZES = {"in_channels": 4, "out_channels": 8, "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
CLASSES = 5
LAYOUTS = ("raw", "safetensors", "both", "ema", "wrapped", "repa")
State = dict[str, Tensor]


def weights(seed: int, **sizes: int) -> State:
    """Return the weights of a network, none of which is zero, by their published names."""
    torch.manual_seed(seed)
    network = DiT(**{**SIZES, **sizes}, num_classes=CLASSES)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network.state_dict()


TRAINED, AVERAGED = weights(0), weights(1)


def released(folder: Path, layout: str) -> Path:
    """Write a file as one of the projects does; its averaged weights are AVERAGED."""
    path = folder / f"{layout}.pt"
    optimiser = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    beside = {"opt": optimiser, "args": argparse.Namespace(model="DiT-XL/2", epochs=1400)}
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(AVERAGED, path)
        return path
    projector = {"projectors.0.0.weight": torch.ones(2, 2)}
    content = {
        "raw": AVERAGED,
        "both": {"model": TRAINED, "ema": AVERAGED, **beside},
        "ema": {"ema": AVERAGED},
        "wrapped": {"model": {f"module.{name}": value for name, value in TRAINED.items()}, "ema": AVERAGED, **beside},
        "repa": {"model": TRAINED | projector, "ema": AVERAGED | projector, **beside, "steps": 3},
    }
    torch.save(content[layout], path)
    return path


def config(folder: Path, **options: Any) -> Path:
    """Write the config of a DiT on a first stage that has weights of its own, and those."""
    first_stage = autoencoder_config(4, resolution=16, channel_mult=[1, 1])
    torch.manual_seed(2)
    torch.save(instantiate(first_stage).state_dict(), folder / "first.ckpt")
    first_stage["checkpoint"] = str(folder / "first.ckpt")
    labels = node("conditioning.labels.ClassConditioner", num_classes=CLASSES, null_label=4, slot="vector")
    network = node("networks.dit.DiT", **SIZES, num_classes=CLASSES)
    parts = {"network": network, "autoencoder": first_stage, "conditioner": labels, **options}
    content = sections_of(latent_diffusion_config(**parts))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def network_of(model: LatentDiffusion) -> State:
    return model.model.diffusion_model.state_dict()


def same(got: State, want: State) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_file_fills_the_network_and_the_config_the_first_stage(tmp_path: Path, layout: str) -> None:
    source = ModelSource(config=config(tmp_path), checkpoint=released(tmp_path, layout))
    model = load_model(source).model
    assert same(network_of(model), AVERAGED)
    assert same(model.first_stage_model.state_dict(), read(tmp_path / "first.ckpt"))


def drawn(folder: Path, *words: str) -> bytes:
    """Sample from the command line and return the bytes of the image."""
    files = ["--config", str(folder / "config.yaml"), "--outdir", str(folder / "out"), "--device", "cpu"]
    sample([*files, "--classes", "1", "--n_samples", "1", "--steps", "2", *words])
    *_, image = sorted((folder / "out" / "samples").iterdir())
    return image.read_bytes()


def test_images_come_from_the_averages_unless_the_trained_weights_are_asked_for(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    config(tmp_path)
    alone = drawn(tmp_path, "--ckpt", str(released(tmp_path, "raw")))
    both = str(released(tmp_path, "both"))
    assert drawn(tmp_path, "--ckpt", both) == alone
    assert "averaged ones (ema) are used" in caplog.text
    assert drawn(tmp_path, "--ckpt", both, "--raw") != alone
    record = json.loads((tmp_path / "out" / "grid-0002.json").read_text())
    assert record["weights"] == "raw" and record["checkpoint"] == both


def test_what_lies_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"ema": AVERAGED, "args": Call()}, tmp_path / "a.pt")
    assert {name.removeprefix("model.diffusion_model.") for name in read(tmp_path / "a.pt")} == AVERAGED.keys()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", ["model", "network", "training"])
def test_a_training_starts_from_a_released_file(tmp_path: Path, place: str) -> None:
    """With both weights where it keeps an average itself, else with the averaged ones."""
    content = yaml.safe_load(config(tmp_path).read_text())
    nodes = {"model": content["model"], "training": content["training"]}
    nodes["network"] = content["model"]["params"]["network"]
    nodes[place]["checkpoint"] = str(released(tmp_path, "both"))
    training = instantiate_training(content)
    assert same(network_of(training.model), TRAINED if place == "training" else AVERAGED)
    assert same(training.model.first_stage_model.state_dict(), read(tmp_path / "first.ckpt"))
    name = "x_embedder.proj.weight"
    average = training.state_dict()[f"model_ema.diffusion_model{name.replace('.', '')}"]
    assert torch.equal(average, AVERAGED[name])


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (node("networks.dit.DiT", **{**SIZES, "depth": 3}, num_classes=CLASSES), "missing .*blocks.2"),
        (node("networks.dit.DiT", **{**SIZES, "hidden_size": 64}, num_classes=CLASSES), r"\(1, 16, 32\) in the file"),
        (unet_config(4), "is a DiT or SiT, and does not fit LatentDiffusion; use it with a config of its network"),
    ],
    ids=["depth", "width", "U-Net"],
)
@pytest.mark.parametrize("layout", ["raw", "both"])
def test_a_network_that_does_not_fit_is_told_in_one_line(tmp_path: Path, network: Any, says: str, layout: str) -> None:
    conditioner = node("conditioning.labels.ClassConditioner", num_classes=CLASSES, null_label=4, slot="vector")
    options = {"network": network, "conditioner": conditioner if "num_classes" in network["params"] else None}
    path = released(tmp_path, layout)
    with pytest.raises(UserError, match=says) as caught:
        load_model(ModelSource(config=config(tmp_path, **options), checkpoint=path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_a_released_file_does_not_bring_is_asked_for(tmp_path: Path, caplog: Any) -> None:
    source = ModelSource(config=config(tmp_path, latent_scale="measure"), checkpoint=released(tmp_path, "raw"))
    with pytest.raises(UserError, match="no latent scale; give it as model.params.latent_scale=NUMBER"):
        load_model(source)
    without = ["model.params.latent_scale=1.0", "model.params.autoencoder.checkpoint=null"]
    assert "no trained weights" not in caplog.text
    load_model(source, overrides=without)
    assert "model.params.autoencoder: the first stage has no trained weights" in caplog.text


def test_a_model_that_is_not_alone_still_has_to_bring_everything(tmp_path: Path) -> None:
    state = load_model(ModelSource(config=config(tmp_path), checkpoint=released(tmp_path, "raw"))).model.state_dict()
    del state["first_stage_model.encoder.conv_in.weight"]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="first_stage_model: 1 missing"):
        load_model(ModelSource(config=tmp_path / "config.yaml", checkpoint=tmp_path / "a.ckpt"))
