"""Launchers and strategies through main.py: all save what one process would save, and go on from each other."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import identity_config, latent_diffusion_config, node, run_config, text_config, unet_config

ROOT = Path(__file__).parents[2]
# Not for every change: gloo's own thread has been seen to crash under FSDP (once in some forty trainings).
pytestmark = pytest.mark.proof
HERE = Path(__file__).parent
STRATEGIES = ("ddp", "zero1", "fsdp")


def config() -> dict[str, Any]:
    schedule = {"warm_up_steps": 4, "lr_start": 0.1, "lr_max": 1.0, "lr_min": 0.1, "max_decay_steps": 8}
    optimization = node(
        "training.optimization.Optimization",
        eps=1e-4,  # large, since Adam's sign of a gradient of nearly nothing is chance
        gradient_clip=1.0,
        schedule=node("training.lr_schedules.WarmUpCosine", **schedule),
    )
    network = unet_config(3, attention_factors=[1], context_dim=8)
    options = {"ema_decay": 0.9, "averages": {"short": 0.2}, "optimization": optimization}
    options["objective"] = node("diffusion.objective.Objective", learn_logvar=True)
    model = latent_diffusion_config(network, identity_config(), text_config(), **options)
    train = node("toy.shapes.Shapes", num_samples=32, size=8)
    validation = node("toy.shapes.Shapes", num_samples=3, size=8, split="validation")
    images = {"every_n_steps": 2, "max_images": 1, "sampler": node("sampling.ddim.DDIM", steps=2)}
    images["guidance"] = node("models.guidance.Guidance", scale=2.0, guide="ema:short")
    lightning = {
        "trainer": {"num_sanity_val_steps": 1, "val_check_interval": 2},
        "callbacks": {"image_logger": {"params": images}},
    }
    return run_config(model, train, validation, lightning=lightning)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def finish(words: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(logs: str, *words: str) -> list[str]:
    return ["-b", "tiny.yaml", "-t", "-l", logs, "--max_steps", "3", *words]


def checkpoint(folder: Path) -> dict[str, Any]:
    (run,) = folder.iterdir()
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content.double()
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Give the largest difference of weights, averages and optimiser state, whose names and shapes must be equal."""
    assert first["state_dict"].keys() == second["state_dict"].keys()
    ours, theirs = ([checkpoint[key] for key in ("state_dict", "optimizer_states")] for checkpoint in (first, second))
    assert ours[1][0]["param_groups"] == theirs[1][0]["param_groups"]
    assert first["lr_schedulers"] == second["lr_schedulers"] and first["global_step"] == second["global_step"]
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config()))
    return folder


@pytest.fixture(scope="module")
def runs(workplace: Path) -> Path:
    """Train with each strategy on two ranks; go on from the run of fsdp with each, and with one process."""
    jobs = [{"world": 2, "arguments": train(name, "--strategy", name)} for name in STRATEGIES]
    finish([sys.executable, str(HERE / "forked_runs.py"), json.dumps(jobs)], workplace)
    jobs = []
    for name in STRATEGIES:
        shutil.copytree(next((workplace / "fsdp").iterdir()), workplace / f"on-{name}" / "run")
        words = ["-r", f"on-{name}/run", "-t", "--max_steps", "5", "--strategy", name]
        jobs.append({"world": 2, "arguments": words})
    shutil.copytree(next((workplace / "fsdp").iterdir()), workplace / "alone" / "run")
    words = ["-r", "alone/run", "-t", "--max_steps", "4", "--devices", "1", "--strategy", "auto"]
    jobs.append({"world": 1, "arguments": words})
    finish([sys.executable, str(HERE / "forked_runs.py"), json.dumps(jobs)], workplace)
    return workplace


def test_sharing_the_optimiser_changes_nothing(runs: Path) -> None:
    assert distance(checkpoint(runs / "ddp"), checkpoint(runs / "zero1")) == 0


def test_sharding_everything_changes_the_order_of_sums_only(runs: Path) -> None:
    assert distance(checkpoint(runs / "ddp"), checkpoint(runs / "fsdp")) < 1e-6


def test_each_strategy_goes_on_from_the_checkpoint_of_sharded_training(runs: Path) -> None:
    ends = [checkpoint(runs / f"on-{name}") for name in STRATEGIES]
    assert [end["global_step"] for end in ends] == [5, 5, 5]
    assert distance(ends[0], ends[1]) == 0
    assert distance(ends[0], ends[2]) < 1e-6


def test_one_process_goes_on_from_the_checkpoint_of_sharded_training(runs: Path) -> None:
    assert checkpoint(runs / "alone")["global_step"] == 4


def test_sharded_training_validates_and_draws_like_the_others(runs: Path) -> None:
    for name in ("ddp", "fsdp"):
        (run,) = (runs / name).iterdir()
        header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
        values = [
            float(row[header.index("val/loss_simple_ema")]) for row in rows if row[header.index("val/loss_simple_ema")]
        ]
        assert values == pytest.approx([values[0]], rel=1e-4) and list((run / "images" / "train").glob("*gs-000002*"))


ADAPTER = "{target: ldm.weights.adapters.LoRA, params: {modules: ['*.to_?', '*.in_layers.2'], rank: 2}}"


@pytest.fixture(scope="module")
def adapters(runs: Path) -> Path:
    """Train an adapter of a trained model with each strategy on two ranks, and go on alone from that of fsdp."""
    words = [f"training.params.adapter={ADAPTER}", f"training.checkpoint={next((runs / 'ddp').iterdir())}"]
    jobs = [{"world": 2, "arguments": train(f"adapter-{name}", "--strategy", name, *words)} for name in STRATEGIES]
    finish([sys.executable, str(HERE / "forked_runs.py"), json.dumps(jobs)], runs)
    shutil.copytree(next((runs / "adapter-fsdp").iterdir()), runs / "adapter-alone" / "run")
    words = ["-r", "adapter-alone/run", "-t", "--max_steps", "4", "--devices", "1", "--strategy", "auto"]
    finish([sys.executable, str(HERE / "forked_runs.py"), json.dumps([{"world": 1, "arguments": words}])], runs)
    return runs


def test_each_strategy_trains_the_same_adapter(adapters: Path) -> None:
    ends = [checkpoint(adapters / f"adapter-{name}") for name in STRATEGIES]
    assert distance(ends[0], ends[1]) == 0 and distance(ends[0], ends[2]) < 1e-6
    trained = [value for name, value in ends[2]["state_dict"].items() if "lora_B" in name]
    assert trained and all(bool(value.any()) for value in trained)  # they start at zero
    assert checkpoint(adapters / "adapter-alone")["global_step"] == 4


def test_torchrun_decides_the_number_of_processes(workplace: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = finish([*launcher, str(ROOT / "main.py"), *train("torchrun")], workplace)
    assert "global batch: 4 = 2 per device x 2 devices x 1 nodes x 1 accumulated" in printed
    assert "strategy ddp" in printed
    assert checkpoint(workplace / "torchrun")["global_step"] == 3  # one run folder, written by the first rank


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Make two network namespaces that see each other: 10.77.0.1 and 10.77.0.2."""
    names = (f"ldm-a-{os.getpid()}", f"ldm-b-{os.getpid()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ldm0", "netns", names[0], "type", "veth", "peer", "name", "ldm0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "ldm0")
            for device in ("lo", "ldm0"):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    else:
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_meet_without_a_launcher(workplace: Path, hosts: tuple[str, str]) -> None:
    words = [sys.executable, str(ROOT / "main.py"), *train("hosts", "--num_nodes", "2", "--devices", "1")]
    meeting = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "ldm0"}
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *words],
            cwd=workplace, env=environment(**meeting, NODE_RANK=str(rank)), stderr=subprocess.PIPE, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "global batch: 4 = 2 per device x 1 devices x 2 nodes" in printed[0]
    assert checkpoint(workplace / "hosts")["global_step"] == 3
    assert yaml.safe_load(next((workplace / "hosts").rglob("config.yaml")).read_text())["training"]["global_batch"] == 4
