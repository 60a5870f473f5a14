from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import autoencoder_config, identity_config, latent_diffusion_config, sections_of, unet_config

from ldm.cli.arguments import boolean, parse
from ldm.cli.train import plan_of
from ldm.compat.compvis.lightning import translate
from ldm.errors import ConfigError, UserError
from ldm.training.devices import Devices, choose
from ldm.training.extensions import callbacks
from ldm.training.learning_rate import learning_rate
from ldm.training.plan import make_plan, untrained_first_stage
from ldm.training.run_folder import new_run


def config(**model: Any) -> dict[str, Any]:
    parts = {"network": unet_config(3), "autoencoder": autoencoder_config(3)}
    data = {"target": "ldm.data.core.module.DataModule", "params": {"batch_size": 4}}
    return sections_of(latent_diffusion_config(**parts | model), learning_rate=1e-4) | {"data": data}


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config()))
    return str(path)


@pytest.mark.parametrize("text", ["yes", "True", "t", "Y", "1"])
def test_words_for_true(text: str) -> None:
    assert boolean(text) is True


@pytest.mark.parametrize("text", ["no", "False", "f", "N", "0"])
def test_words_for_false(text: str) -> None:
    assert boolean(text) is False


def test_overrides_may_follow_flags_whose_value_is_optional() -> None:
    words = "--base a.yaml b.yaml -t model.params.x=1 --scale_lr data.params.train[0].size=8 -s 5 --no-test false"
    arguments = parse(words.split())
    assert arguments.base == ["a.yaml", "b.yaml"]
    assert arguments.overrides == ["model.params.x=1", "data.params.train[0].size=8"]
    assert (arguments.train, arguments.scale_lr, arguments.no_test, arguments.seed) == (True, True, False, 5)
    assert parse([]).scale_lr is None


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(UserError, match="--max_step: .*--max_steps"):
        parse(["--max_step=3", "-t"])


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("1", 1), ("2", 2), ("0,", [0]), ("0,1", [0, 1]), ("3,", [3])],
)
def test_forms_of_gpus(gpus: str, expected: int | list[int]) -> None:
    assert choose(gpus, None, None, {}) == Devices("gpu", expected)


def test_no_gpus_means_the_cpu_and_devices_count_there() -> None:
    assert choose("0", None, None, {}) == Devices("cpu", 1)
    assert choose(None, "2", "cpu", {}) == Devices("cpu", 2)
    assert choose(None, None, "cpu", {"devices": [0, 1]}).count == 2


def test_config_chooses_devices_unless_the_command_line_does() -> None:
    trainer = {"gpus": "0,1", "precision": 32}
    assert choose(None, None, None, trainer) == Devices("gpu", [0, 1])
    assert trainer == {"precision": 32}
    assert choose(None, "1", "cpu", {"gpus": 4}) == Devices("cpu", 1)


@pytest.mark.parametrize("gpus", ["", "x", "0,0", "1,-2"])
def test_devices_that_mean_nothing_are_refused(gpus: str) -> None:
    with pytest.raises(UserError, match="--gpus"):
        choose(gpus, None, None, {})


def test_absent_devices_are_named() -> None:
    with pytest.raises(UserError, match="GPU 997,999 "):
        Devices("gpu", [997, 999]).check()
    Devices("cpu", 64).check()
    with pytest.raises(UserError, match="devices: 99999 processes on .* cores; use at most"):
        Devices("cpu", 99999).check()


def test_learning_rate_per_sample_is_scaled_by_default_as_in_the_original() -> None:
    model = {"base_learning_rate": 2e-6}
    assert learning_rate(model, 96, None) == pytest.approx(1.92e-4)
    assert learning_rate(model, 96, False) == 2e-6


def test_absolute_learning_rate_stays_unless_scaling_is_asked_for() -> None:
    model = {"learning_rate": 1e-4, "global_batch": 32}
    assert learning_rate(model, 64, None) == 1e-4
    assert learning_rate(model, 64, True) == pytest.approx(2e-4)
    assert learning_rate({"learning_rate": 1e-4}, 64, True) == 1e-4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "neither is given"),
        ({"learning_rate": 1e-4, "base_learning_rate": 1e-6}, "both are given"),
        ({"learning_rate": "1e-4"}, "write 1.0e-4"),
        ({"learning_rate": -1.0}, "no positive number"),
    ],
)
def test_unusable_learning_rates_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning_rate(model, 1, None)


def test_global_batch_counts_devices_nodes_and_accumulation(base: str, tmp_path: Path) -> None:
    words = f"-b {base} -l {tmp_path} --accelerator cpu --devices 2 --num_nodes 3"
    plan = plan_of(parse([*words.split(), "lightning.trainer.accumulate_grad_batches=5"]))
    assert plan.batch.total == 4 * 2 * 3 * 5
    assert str(plan.batch) == "120 = 4 per device x 2 devices x 3 nodes x 5 accumulated"
    assert plan.config["training"]["global_batch"] == 120
    assert plan.config["lightning"]["trainer"]["num_nodes"] == 3


def test_run_is_named_by_time_name_and_postfix(base: str, tmp_path: Path) -> None:
    named = plan_of(parse(["-b", base, "-l", str(tmp_path / "runs"), "-n", "mine", "-f", "_x"])).run.path
    assert named.parent == tmp_path / "runs" and named.name.endswith("_mine_x") and named.name[10] == "T"
    assert plan_of(parse(["-b", base, "-l", str(tmp_path)])).run.path.name.endswith("_tiny")
    assert not named.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lightning.trainer.max_step=3", "lightning.trainer.max_step: unknown; did you mean max_steps"),
        ("lightning.trainr.x=1", "lightning.trainr: unknown; did you mean trainer"),
        ("lightning.trainer.logger=1", "lightning.trainer.logger: unknown"),
        ("lightning.cache_latents.views=0", "lightning.cache_latents: .*views"),
        ("lightning.compile=fast", "lightning.compile: .*fast"),
        ("lightning.compile.mode=fast", "lightning.compile: .*'mode': 'fast'.*max-autotune"),
        ("lightning.compile.mode=reduce-overhead", "lightning.compile: .*reduce-overhead.*max-autotune-no-cudagraphs"),
        ("lightning.float32_matmul_precision=tf32", "lightning.float32_matmul_precision: .*tf32"),
        ("lightning.trainer.precision=transformer-engine", "--precision: transformer-engine.*bf16-mixed"),
        ("lightning.cache_latents=perhaps", "lightning.cache_latents: 'perhaps'"),
        ("lightning.channels_last=perhaps", "lightning.channels_last: 'perhaps'"),
        ("lightning.max_skipped_steps=0", "lightning.max_skipped_steps: 0 is not"),
        ("--strategy fsdp lightning.channels_last=true", "lightning.channels_last: fsdp"),
        ("-s -3", "--seed: -3"),
        ("-n a/b", "--name: 'a/b'"),
        ("data.params.batch_size=0", "data.params.batch_size: 0 is not a whole number, 1 or more"),
        ("model.params.network.params.num_head=1", "num_head: unknown; did you mean num_heads"),
        ("-r nowhere", "--resume: nowhere does not exist"),
        ("-r . -n x", "a run that goes on keeps its name"),
        ("--gpus 0 --devices 1", "give one of them"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(base: str, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(parse(["-b", base, *words.split()]))


@pytest.mark.parametrize("section", ["model", "training", "data"])
def test_a_config_without_a_section_is_refused(section: str, tmp_path: Path) -> None:
    content = config()
    del content[section]
    with pytest.raises(UserError, match=f"{section}: missing"):
        make_plan(content, new_run(tmp_path))


def test_first_stage_without_weights_is_noticed(base: str, tmp_path: Path) -> None:
    assert untrained_first_stage(plan_of(parse(["-b", base])))
    assert not untrained_first_stage(plan_of(parse(["-b", base, "model.params.autoencoder.checkpoint=x.ckpt"])))
    alone = tmp_path / "network.pt"
    torch.save({"model.diffusion_model.out.2.weight": torch.ones(1)}, alone)
    assert untrained_first_stage(plan_of(parse(["-b", base, f"model.checkpoint={alone}"])))
    torch.save({"model.diffusion_model.out.2.weight": torch.ones(1), "first_stage_model.x": torch.ones(1)}, alone)
    assert not untrained_first_stage(plan_of(parse(["-b", base, f"training.checkpoint={alone}"])))
    pixels = tmp_path / "pixels.yaml"
    pixels.write_text(yaml.safe_dump(config(autoencoder=identity_config())))
    assert not untrained_first_stage(plan_of(parse(["-b", str(pixels)])))


@pytest.mark.parametrize("key", ["keep_last", "keep_every_n_steps", "every_n_steps"])
def test_what_is_said_of_checkpoints_is_what_is_used(base: str, key: str) -> None:
    plan = plan_of(parse(["-b", base, f"lightning.modelcheckpoint.params.{key}=7"]))
    *_, part = callbacks(plan.lightning, plan.run)
    assert getattr(part.build(), key) == 7


def test_lightning_section_of_the_original_is_translated() -> None:
    section = {
        "callbacks": {
            "image_logger": {
                "target": "main.ImageLogger",
                "params": {"batch_frequency": 5000, "max_images": 8, "increase_log_steps": False},
            },
            "setup_callback": {"target": "main.SetupCallback"},
            "metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_steps": 50}},
        },
        "modelcheckpoint": {"params": {"every_n_train_steps": 10, "save_top_k": 3, "monitor": "val/rec_loss"}},
        "trainer": {"benchmark": True, "progress_bar_refresh_rate": 5},
    }
    translated = translate(section)
    image_logger = {"params": {"every_n_steps": 5000, "max_images": 8, "early_steps": False}}
    assert translated["callbacks"] == {"image_logger": image_logger}
    assert translated["modelcheckpoint"]["params"] == {
        "every_n_steps": 10, "monitor": "val/rec_loss", "keep_every_n_steps": 50,
    }  # fmt: skip
    assert translated["trainer"] == {"benchmark": True}
    again = translate(translated)
    assert again == translated


def test_moved_data_need_one_override(tmp_path: Path) -> None:
    """References within the data are kept as such by a run; those that an override made something else are not."""
    train, validation = {"root": "A", "size": 8, "captions": None}, {}
    for key in train:
        validation[key] = f"${{data.params.train.params.{key}}}"
    validation["root"] = "${data.params.train.params.root}/val"
    folder = "ldm.data.readers.captions.CaptionedFolder"
    content = config()
    content["data"]["params"] |= {
        "train": {"target": folder, "params": train}, "validation": {"target": folder, "params": validation},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    plan = plan_of(parse(["-b", str(tmp_path / "a.yaml"), "data.params.validation.params.size=16"]))
    assert plan.config["data"]["params"]["validation"]["params"] == {"root": "A/val", "size": 16, "captions": None}
    written = plan.written["data"]["params"]["validation"]["params"]
    assert written == {**validation, "size": 16} and plan.written["model"] == plan.config["model"]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(plan.written))
    moved = plan_of(parse(["-b", str(tmp_path / "b.yaml"), "data.params.train.params.root=B"]))
    assert moved.config["data"]["params"]["validation"]["params"]["root"] == "B/val"


@pytest.mark.parametrize("root", ["/d/${x}", "${data.params.batch_size}", "a${b.c}d${e}"])
def test_a_path_that_looks_like_a_reference_stays_one_in_the_record(root: str, tmp_path: Path) -> None:
    content = config()
    content["data"]["params"] |= {"train": {"target": "ldm.data.readers.folders.ImageFolder", "params": {"size": 8}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    escaped = root.replace("${", "\\${")
    first = plan_of(parse(["-b", str(tmp_path / "a.yaml"), f"data.params.train.params.root={escaped}"]))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(first.written))
    for plan in (first, plan_of(parse(["-b", str(tmp_path / "b.yaml")]))):
        assert plan.config["data"]["params"]["train"]["params"]["root"] == root
    with pytest.raises(ConfigError, match=r"x.*write \\\$\{ where no reference is meant"):
        plan_of(parse(["-b", str(tmp_path / "a.yaml"), "data.params.train.params.root=${x}"]))


def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_made() -> None:
    with pytest.raises(UserError, match="--precision 16-mixed: .*CPU.*bf16-mixed"):
        Devices("cpu", 1).check_precision("16-mixed")
    for precision in ("32", "bf16-mixed", "64-true"):
        Devices("cpu", 1).check_precision(precision)


def test_channels_last_is_for_cuda_unless_it_is_asked_for(base: str, tmp_path: Path) -> None:
    words = ["-b", base, "-l", str(tmp_path), "--accelerator", "cpu"]
    assert not plan_of(parse(words)).channels_last
    assert plan_of(parse([*words, "lightning.channels_last=true"])).channels_last
