"""Mistakes in configs are found at the start, in one line; a hint is only given where following it works."""

import copy
import logging
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from prove_configs import at, is_right, misspell, mutate, names_place, places

from ldm.config.check import check_sections
from ldm.config.nodes import is_node
from ldm.config.plain import resolve
from ldm.errors import UserError
from ldm.training.plan import make_plan
from ldm.training.run import build_without_memory, train_plan
from ldm.training.run_folder import new_run

Config = dict[str, Any]
Place = tuple[Any, ...]
# Names of other frameworks, and of other classes than those that one has here.
STRANGERS = (
    "use_linear_in_transformer", "cross_attention_dim", "block_out_channels", "sample_size", "layers", "head_dim", "lr",
    "num_train_timesteps", "beta_schedule", "optimizer", "scheduler", "batchsize", "image_size", "sizes", "channel",
)  # fmt: skip
OTHERS = (
    "cldm.cldm.ControlLDM", "ldm.models.diffusion.ddpm_edit.LatentDiffusion", "sgm.models.diffusion.DiffusionEngine",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "ldm.networks.unet.ControlNet", "ldm.networks.dit.DiT",
    "torch.nn.Identitie", "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "ldm.networks.unet.UNetModel",
    "ldm.networks.UNet", "pytorch_lightning.Trainer", "diffusers.UNet2DModel", "ldn.networks.unet.UNet",
)  # fmt: skip
SLIPS = ("torch.nn.Identitie", "ldn.networks.unet.UNet")
ABSURD = (10**7, 2 * 10**9, 2**62, 10**30, -1, 0, float("nan"), float("inf"), 1e300, [1] * 5000, "9" * 300, True)


def config() -> Config:
    """Return a config of an autoencoder with all its losses, or rather of its training."""
    training = tiny.autoencoder_training_config(lr_schedule=tiny.node("training.lr_schedules.WarmUpLinear", **LINEAR))
    data = tiny.node("toy.shapes.Shapes", num_samples=8, size=32, fields=[])
    training["params"]["model"]["params"]["regularizer"] = tiny.node("autoencoder.regularizers.KL")
    return tiny.run_config(training, data, data, lightning={"modelcheckpoint": {"params": {"keep_last": 2}}})


LINEAR = {"warm_up_steps": 1, "f_min": 1.0, "f_max": 1.0, "f_start": 1.0, "cycle_lengths": 10}


def latent_config() -> Config:
    """Return a config of a text-conditional latent model."""
    training = tiny.latent_diffusion_config(
        tiny.unet_config(context_dim=tiny.WIDTH, attention_factors=[1]), tiny.autoencoder_config(), tiny.text_config(),
        objective=tiny.node("diffusion.objective.Objective", weighting=tiny.node("diffusion.weighting.MinSNR")),
        optimization=tiny.node("training.optimization.Optimization"),
    )  # fmt: skip
    data = tiny.node("toy.shapes.Shapes", num_samples=8, size=tiny.SIZE, fields=["caption"])
    return tiny.run_config(training, data, data)


DISCRIMINATOR = ("training", "params", "loss", "params", "discriminator", "params")
CONFIGS = {"autoencoder": config, "latent": latent_config}


def problem(content: Config, folder: Path, build: bool = False) -> str:
    """Return what is wrong with a config, one line; empty if nothing is. Any other exception is a failure."""
    content = copy.deepcopy(content)
    try:
        check_sections(content)
        plan = make_plan(content, new_run(folder))
        if build:
            build_without_memory(plan)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 300
        return str(error)
    return ""


def changed(content: Config, place: Place, value: Any) -> Config:
    content = copy.deepcopy(content)
    at(content, place[:-1])[place[-1]] = value
    return content


def follow(message: str, content: Config, place: Place) -> Config:
    """Return a config in which the key or the part of a target at a place is what a message takes it to mean."""
    meant = re.search(r"did you mean (\S+)\?", message)[1]
    content = copy.deepcopy(content)
    parent = at(content, place[:-1])
    if place[-1] != "target":
        parent[meant] = parent.pop(place[-1])
        return content
    parts = parent["target"].split(".")
    guesses = [".".join([*parts[:i], meant, *parts[i + 1 :]]) for i in range(len(parts))]
    parent["target"] = next((guess for guess in guesses if not problem(changed(content, place, guess), Path())), meant)
    return content


@pytest.mark.parametrize("name", CONFIGS)
def test_hints_to_slips_work(name: str, tmp_path: Path) -> None:
    content, rng, hints = CONFIGS[name](), random.Random(0), 0
    for place, value in rng.sample(list(places(content)), 40):
        if not isinstance(place[-1], str) or len(place[-1]) < 3 or place[:2] == ("lightning", "callbacks"):
            continue
        wrong = misspell(place[-1], rng)
        if place[-1] == "target":
            parts = value.split(".")
            spot = rng.randrange(len(parts))
            parts[spot] = misspell(parts[spot], rng)
            slip, at_place = changed(content, place, ".".join(parts)), place
        else:
            slip, at_place = copy.deepcopy(content), (*place[:-1], wrong)
            parent = at(slip, place[:-1])
            parent[wrong] = parent.pop(place[-1])
        message = problem(slip, tmp_path)
        assert slip == content or message
        if "did you mean" in message:
            hints += 1
            assert not problem(follow(message, slip, at_place), tmp_path), message
    assert hints > 10


@pytest.mark.parametrize("name", ["latent", pytest.param("autoencoder", marks=pytest.mark.slow)])
def test_hints_to_strangers_work(name: str, tmp_path: Path) -> None:
    content = CONFIGS[name]()
    for place, value in [((), content), *places(content)]:
        if not is_node(value):
            continue
        for index, word in enumerate(STRANGERS):
            strange = changed(content, (*place, "params", word), (True, 4, [1, 2], "a", 0.5)[index % 5])
            if "did you mean" in (message := problem(strange, tmp_path)):
                assert not problem(follow(message, strange, (*place, "params", word)), tmp_path), message
        for target in OTHERS if len(place) < 4 else ():
            message = problem(changed(content, (*place, "target"), target), tmp_path)
            assert message and ("did you mean" not in message or target in SLIPS)


def test_a_node_of_another_class_is_refused_or_works(tmp_path: Path) -> None:
    check_exchanged(30, tmp_path)


@pytest.mark.slow
def test_any_node_in_the_place_of_any_other(tmp_path: Path) -> None:
    check_exchanged(10**6, tmp_path)


def check_exchanged(most: int, folder: Path) -> None:
    contents = [make() for make in CONFIGS.values()]
    pool = {value["target"]: value for content in contents for _, value in places(content) if is_node(value)}
    spots = [(content, place) for content in contents for place, value in places(content) if is_node(value)]
    pairs = [(content, place, node) for content, place in spots for node in pool.values()]
    for content, place, node in random.Random(1).sample(pairs, min(most, len(pairs))):
        problem(changed(content, place, node), folder, build=True)


@pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=pytest.mark.slow)])
def test_absurd_values_are_refused_or_work_at_once(share: float, tmp_path: Path) -> None:
    rng = random.Random(2)
    for make in CONFIGS.values():
        content = make()
        for place, value in places(content):
            for absurd in ABSURD:
                if isinstance(value, (int, float, list)) and rng.random() < share:
                    start = time.process_time()
                    problem(changed(content, place, copy.deepcopy(absurd)), tmp_path, build=True)
                    assert time.process_time() - start < 20, (place, absurd)


@pytest.mark.parametrize(
    ("make", "place", "value", "named"),
    [
        (config, (*DISCRIMINATOR, "num_layers"), 5, "discriminator"),
        (config, (*DISCRIMINATOR, "num_layers"), 500_000, "num_layers"),
        (config, ("model", "params", "architecture", "params", "num_res_blocks"), 10**7, "num_res_blocks"),
        (config, ("model", "params", "architecture", "params", "channels"), 32_000_000, "channels"),
        (config, ("lightning", "trainer", "val_check_interval"), 1e18, "val_check_interval"),
        (config, ("lightning", "trainer", "limit_val_batches"), 1.5, "limit_val_batches"),
        (config, ("lightning", "modelcheckpoint", "params", "keep_lst"), 1, "keep_last"),
        (config, ("lightning", "modelcheckpoint", "params", "every_n_stepz"), 1, "every_n_stepz"),
        (config, ("lightning", "modelcheckpoint", "target"), "pytorch_lightning.callbacks.Timer", "modelcheckpoint"),
        (config, ("lightning", "callbacks", "x"), tiny.node("toy.shapes.Shapes", num_samples=1), "callbacks.x"),
        (config, ("training", "learning_rate"), float("nan"), "learning_rate"),
        (latent_config, ("model", "params", "process", "params", "num_steps"), 2 * 10**9, "num_steps"),
        (latent_config, ("model", "params", "network", "params", "attention_factors"), [0, 0, 0], "attention_factors"),
        (latent_config, ("model", "params", "network", "params", "attention_factors"), [3], "attention_factors"),
        (latent_config, ("model", "params", "network", "params", "channel_mult"), [1] * 5000, "channel_mult"),
        (latent_config, ("model", "params", "process"), tiny.text_config()["params"]["tokenizer"], "process"),
        (latent_config, ("model", "params", "process"), tiny.node("diffusion.process.Process"), "process"),
        (latent_config, ("lightning", "callbacks", "image_logger"), {}, "image_logger"),
    ],
)  # fmt: skip
def test_what_is_knowable_at_the_start_is_found_there(
    make: Any, place: Place, value: Any, named: str, tmp_path: Path
) -> None:
    message = problem(changed(make(), place, value), tmp_path, build=True)
    assert named in message


def test_tensorboard_by_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_ALLOW", f"path:{tmp_path}")
    logger = {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": {"save_dir": str(tmp_path)}}
    assert not problem(changed(config(), ("lightning", "logger"), logger), tmp_path)
    assert not problem(changed(config(), ("lightning", "logger"), {"tensorboard": {**logger, "params": {}}}), tmp_path)
    logger["params"]["sve_dir"] = logger["params"].pop("save_dir")
    assert "save_dir" in problem(changed(config(), ("lightning", "logger"), logger), tmp_path)


@pytest.mark.proof
def test_mutated_configs_that_are_really_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert wrongly_trained(120, tmp_path, seed=0) == []


def test_some_of_them(tmp_path: Path) -> None:
    assert wrongly_trained(4, tmp_path, seed=3) == []


def wrongly_trained(count: int, folder: Path, seed: int) -> list[str]:
    """Train mutated configs for two steps; list those that end in a traceback, or should have been refused."""
    logging.disable(logging.WARNING)
    rng, wrong = random.Random(seed), []
    for number in range(count):
        content = list(CONFIGS.values())[number % 2]()
        content["training"]["allow_untrained_first_stage"] = True
        content["lightning"]["trainer"] |= {"max_steps": 2, "limit_val_batches": 1, "enable_progress_bar": False}
        content["lightning"]["callbacks"] |= {"progress": None}
        kind, place, new = mutate(content, rng)
        if isinstance(new.get("lightning"), dict):
            new["lightning"].setdefault("trainer", {})
        what = f"{number}: {kind} {place}"
        try:
            check_sections(resolve(new))
            plan = make_plan(copy.deepcopy(new), new_run(folder, str(number)))
            train_plan(plan, test=False)
        except UserError as error:
            if not names_place(str(error), place):
                wrong.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 - what a user would see as a traceback is what is looked for
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if not is_right(content, kind, place, plan, new):
                wrong.append(f"{what}: accepted")
    logging.disable(logging.NOTSET)
    return wrong
