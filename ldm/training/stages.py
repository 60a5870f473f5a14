"""Train configs one after the other, as scripts with several stages do."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import compat
from ldm.config.files import config_of_run
from ldm.config.nodes import is_node, walk
from ldm.config.places import check_places
from ldm.config.plain import plain
from ldm.errors import UserError
from ldm.models.loading import is_first_stage
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.run import train
from ldm.training.run_folder import new_run

_log = logging.getLogger(__name__)
_PARAMS = "training.params"
# What a teacher was trained with that has no part in a distillation, or trains less than the whole network.
_NOT_OF_A_STUDENT = ("objective", "alignment", "distillation", "adapter", "train", "learning_rates")
_DISTILLATION = "ldm.training.distillation.ConsistencyDistillation"
_OPTIMIZATION = "ldm.training.optimization.Optimization"
# A student is its own target: at its teacher's rate it diverges (measured, docs/train.md).
_SHARE_OF_THE_RATE, _GRADIENT_CLIP = 1 / 20, 1.0
_PREVIEWS = {
    "sampler": {"target": "ldm.sampling.consistency.Consistency", "params": {"steps": 4}},
    "guidance_scale": None,
    "guidance": None,
}


def train_config(config: Path, logs: Path, overrides: Sequence[str], title: str, name: str | None = None) -> Path:
    """Train a config file with `logs` as the folder of runs, and return the run folder.

    Logs the command that does the same. UserError if the training was asked to stop before its end.

    name: of the run, by default that of the file.
    """
    name = config.stem if name is None else name
    words = ["--base", str(config), "-t", "--logdir", str(logs), "--name", name, *overrides]
    _log.info("\n%s\npython main.py %s\n", title, shlex.join(words))
    try:
        content, run = compat.load(config, overrides), new_run(logs, name)
        check_places(plain(content.get("lightning")) or {}, run.path)  # the config may be that of a stranger's teacher
        return train(content, run).folder
    except Stopped as stop:
        raise UserError(str(stop)) from stop


def distill(
    teacher: str, guidance: float, intervals: int, logs: Path, name: str = "student", overrides: Sequence[str] = ()
) -> Path:
    """Distil a run into a student, see `ldm.training.distillation`, and return the run folder.

    UserError for a teacher that is no run, and as `train` does.
    """
    config = config_of_run(teacher)
    if config is None:
        raise UserError(f"teacher {teacher}: no configs/config.yaml beside it, whose data the student is trained on")
    if is_first_stage(teacher):
        raise UserError(f"teacher {teacher}: is a first stage; give the run of a diffusion model")
    of_student = student_overrides(compat.read(config), teacher, guidance, intervals)
    return train_config(config, logs, [*of_student, *overrides], f"distilling {teacher}", name)


def student_overrides(config: Mapping[str, Any], teacher: str, guidance: float, intervals: int) -> list[str]:
    """Return what makes the config of a teacher that of its student."""
    started = [path for path, node in walk(config, "") if is_node(node) and node.get("checkpoint")]
    words = [f"{path}.{key}=null" for path in started for key in ("checkpoint", "ignore_keys")]
    words.append(_override("model.checkpoint", teacher))
    training = config.get("training") or {}
    given = training.get("params") or {}
    words += [f"{_PARAMS}.{name}=null" for name in _NOT_OF_A_STUDENT if given.get(name) is not None]
    words += _calmed(training)
    params = {"teacher": teacher, "guidance": guidance, "intervals": intervals}
    words.append(_override(f"{_PARAMS}.distillation", {"target": _DISTILLATION, "params": params}))
    callbacks = (config.get("lightning") or {}).get("callbacks") or {}
    if callbacks.get("image_logger", {}) is not None:
        words.append(_override("lightning.callbacks.image_logger.params", _PREVIEWS))
    return words


def _calmed(training: Mapping[str, Any]) -> list[str]:
    """Return what lowers the learning rate of a teacher, and clips gradients where the teacher does not."""
    rates = {name: training.get(name) for name in ("learning_rate", "base_learning_rate")}
    words = [
        _override(f"training.{name}", rate * _SHARE_OF_THE_RATE)
        for name, rate in rates.items()
        if isinstance(rate, (int, float)) and not isinstance(rate, bool)
    ]
    optimization = (training.get("params") or {}).get("optimization") or {"target": _OPTIMIZATION}
    settings = optimization.get("params") or {}
    if optimization.get("target") == _OPTIMIZATION and settings.get("gradient_clip") is None:
        calm = {**optimization, "params": {**settings, "gradient_clip": _GRADIENT_CLIP}}
        words.append(_override(f"{_PARAMS}.optimization", calm))
    return words


def _override(key: str, value: Any) -> str:
    """Write an override; JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
