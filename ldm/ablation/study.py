"""A study: trials that differ in named axes, what is equal for all, and how they are evaluated. Read from YAML.

    title, text   heading of the report, and what the study does and does not show
    first_stage   config of the first stage; `none` diffuses pixels; left out, the latent config's own stays as it is
    latent        config of the latent model
    set           settings of all trials, {KEY: value}. A KEY begins with
                    first_stage.  latent.     and goes on with a key of that config
                    first_stage.checkpoint    weights, in place of a training
                    sample.                   and is scale, eta, sampler, H or W of the evaluation
    axes          name -> {value: settings}, as in `set`; `first_stage` and `latent` name other configs;
                  or name -> {key: KEY, values: [...]} where only one key changes
    seeds         of the latent trainings; first stages are trained once
    budget        one of steps, samples, minutes, for every latent training; points: how often it is evaluated;
                  parameters: largest relative difference between the sizes of the networks, unchecked if absent
    evaluation    metrics, first_stage_metrics, extractor, num_samples, steps (of the sampler at the end of a
                  training), curve_steps (on the way)
    workers       trainings at a time on the CPU

Paths of configs are relative to the study's file; a checkpoint, as in every config, to the working directory. Settings
are overrides as on the command line of main.py: a mapping is merged into the one that is there, unless it is a node
with a target of its own. `minutes` become steps by the speed of a short training before the real one, so that a run
keeps its length when it is interrupted or the machine is busier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.config.files import read_yaml
from ldm.config.overrides import parse_override
from ldm.config.plain import resolve
from ldm.config.targets import did_you_mean
from ldm.errors import ConfigError, UserError

BUDGETS = ("steps", "samples", "minutes")
PIXELS = "none"
_SECTIONS = ("model", "training", "data", "lightning")
_KEYS = {
    "first_stage": (*_SECTIONS, "checkpoint"),
    "latent": _SECTIONS,
    "sample": ("scale", "eta", "sampler", "H", "W"),
}
_CONFIGS = ("first_stage", "latent")
Settings = tuple[tuple[str, Any], ...]  # (dotted key, value), in the order in which they are applied


@dataclass(frozen=True)
class Variant:
    """Settings of a trial. Keys `first_stage` and `latent` name a config, and drop earlier settings of it."""

    settings: Settings = ()

    def changed(self, later: Variant) -> Variant:
        """Return these settings followed by others."""
        return Variant((*self.settings, *later.settings))

    def config(self, part: str) -> Any:
        """Return the path of a config, PIXELS, or None if none is named."""
        return next((value for key, value in reversed(self.settings) if key == part), None)

    def of(self, part: str) -> Settings:
        """Return the settings of a part since its config was named, with keys inside of it."""
        start = max((place for place, (key, _) in enumerate(self.settings) if key == part), default=-1)
        chosen = self.settings[start + 1 :]
        return tuple((key.removeprefix(f"{part}."), value) for key, value in chosen if key.startswith(f"{part}."))

    @property
    def checkpoint(self) -> str | None:
        """Return the weights of the first stage, None if it is trained."""
        return dict(self.of("first_stage")).get("checkpoint")

    @property
    def sample(self) -> dict[str, Any]:
        """Return the settings of the evaluation's samples."""
        return dict(self.of("sample"))

    @property
    def changes_training(self) -> bool:
        """Return whether anything but sampling is set."""
        return any(not key.startswith("sample.") for key, _ in self.settings)


@dataclass(frozen=True)
class Budget:
    """Length of each latent training: an amount of one of BUDGETS, evaluated at `points` equal distances."""

    kind: str
    amount: float
    points: int = 1
    parameters: float | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """How models are evaluated: with `steps` of the sampler at the end of a training, `curve_steps` on the way."""

    metrics: tuple[str, ...]
    extractor: str
    num_samples: int
    steps: tuple[int, ...] = (50,)
    curve_steps: int = 50
    first_stage_metrics: tuple[str, ...] = ("psnr",)

    @property
    def all_steps(self) -> tuple[int, ...]:
        """Return the numbers of steps at the end of a training, in order; `curve_steps` is one of them."""
        return tuple(sorted({*self.steps, self.curve_steps}))


@dataclass(frozen=True)
class Trial:
    """One value of each axis, with one seed."""

    labels: dict[str, Any]
    seed: int
    variant: Variant

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.labels.items())


@dataclass(frozen=True)
class Study:
    """The content of a study's file; `last` is applied after the settings of the axes."""

    name: str
    title: str
    text: str
    variant: Variant
    axes: dict[str, dict[Any, Variant]]
    seeds: tuple[int, ...]
    budget: Budget
    evaluation: EvaluationSpec
    workers: int = 1
    last: Variant = Variant()

    def trials(self) -> Iterator[Trial]:
        """Yield every combination of values of the axes with every seed."""
        for seed in self.seeds:
            for values in product(*self.axes.values()):
                labels, variant = dict(zip(self.axes, values, strict=True)), self.variant
                for name, value in labels.items():
                    variant = variant.changed(self.axes[name][value])
                yield Trial(labels, seed, variant.changed(self.last))

    def changed(self, overrides: Sequence[str]) -> Study:
        """Return the study with `KEY=VALUE` set in every trial. UserError for unknown keys."""
        settings = []
        for override in overrides:
            if "." not in override.partition("=")[0] or "=" not in override:
                raise UserError(f"{override!r}: write first_stage.KEY=VALUE or latent.KEY=VALUE")
            settings.append(parse_override(override))
            _check_key(settings[-1][0], "")
        return replace(self, last=self.last.changed(Variant(tuple(settings))))


def read(path: Path) -> Study:
    """Read a study. ConfigError names the place in the file."""
    try:
        return _study(path, resolve(read_yaml(path)))
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(path)) from error


def _study(path: Path, content: Any) -> Study:
    known = ("title", "text", *_CONFIGS, "set", "axes", "seeds", "budget", "evaluation", "workers")
    content = _mapping(content, "", known, required=("title", "latent", "axes", "budget", "evaluation"))
    axes = _mapping(content["axes"], "axes")
    if not axes:
        raise ConfigError("name at least one axis", "axes")
    configs = _variant({name: content[name] for name in _CONFIGS if name in content}, "", path.parent)
    return Study(
        name=path.stem,
        title=str(content["title"]),
        text=str(content.get("text", "")),
        variant=configs.changed(_variant(content.get("set") or {}, "set", path.parent)),
        axes={str(name): _axis(axis, f"axes.{name}", path.parent) for name, axis in axes.items()},
        seeds=tuple(_whole(seed, "seeds", 0) for seed in _list(content.get("seeds", [23]), "seeds")),
        budget=_budget(content["budget"]),
        evaluation=_evaluation(content["evaluation"]),
        workers=_whole(content.get("workers", 1), "workers", 1),
    )


def _axis(node: Any, path: str, folder: Path) -> dict[Any, Variant]:
    node = _mapping(node, path)
    if not node:
        raise ConfigError("name at least one value", path)
    if "key" not in node:
        return {value: _variant(settings or {}, f"{path}.{value}", folder) for value, settings in node.items()}
    node = _mapping(node, path, ("key", "values"), required=("key", "values"))
    values = _list(node["values"], f"{path}.values")
    named = {str(value) if isinstance(value, (list, dict)) else value: value for value in values}
    return {name: _variant({node["key"]: value}, f"{path}.key", folder) for name, value in named.items()}


def _variant(node: Any, path: str, folder: Path) -> Variant:
    settings = []
    for key, value in _mapping(node, path).items():
        if key in _CONFIGS:
            settings.insert(0, (key, _config(value, key, f"{path}.{key}".lstrip("."), folder)))
        else:
            _check_key(str(key), path)
            settings.append((str(key), value))
    return Variant(tuple(settings))


def _config(value: Any, part: str, path: str, folder: Path) -> Path | str:
    if part == "first_stage" and value == PIXELS:
        return PIXELS
    if not (folder / str(value)).is_file():
        raise ConfigError(f"there is no {value} in the folder of the study", path)
    return (folder / str(value)).resolve()


def _check_key(key: str, path: str) -> None:
    """Raise ConfigError unless a key begins as one of a setting does."""
    part, _, rest = key.partition(".")
    if part not in _KEYS:
        hint = did_you_mean(part, _KEYS) or f"; begin with {'., '.join(_KEYS)}."
        raise ConfigError(f"unknown{hint}", _at(path, key))
    name = rest.partition(".")[0]
    if name not in _KEYS[part]:
        hint = did_you_mean(name, _KEYS[part]) or f"; known are {', '.join(_KEYS[part])}"
        raise ConfigError(f"{name}: unknown{hint}", _at(path, key))


def _at(path: str, key: str) -> str:
    return f"{path}.{key}".lstrip(".")


def _budget(node: Any) -> Budget:
    node = _mapping(node, "budget", (*BUDGETS, "points", "parameters"))
    kinds = [kind for kind in BUDGETS if kind in node]
    if len(kinds) != 1:
        raise ConfigError(f"give one of {', '.join(BUDGETS)}", "budget")
    amount, tolerance = node[kinds[0]], node.get("parameters")
    if not is_number(amount) or amount <= 0:
        raise ConfigError(f"{amount!r} is no positive number", f"budget.{kinds[0]}")
    if tolerance is not None and (not is_number(tolerance) or tolerance < 0):
        raise ConfigError(f"{tolerance!r} is no number from 0 up; 0.1 allows a difference of 10%", "budget.parameters")
    return Budget(kinds[0], amount, _whole(node.get("points", 1), "budget.points", 1), tolerance)


def _evaluation(node: Any) -> EvaluationSpec:
    known = tuple(EvaluationSpec.__dataclass_fields__)
    node = _mapping(node, "evaluation", known, required=("metrics", "extractor", "num_samples"))
    steps = [_whole(count, "evaluation.steps", 1) for count in _list(node.get("steps", [50]), "evaluation.steps")]
    on_first_stages = _list(node.get("first_stage_metrics", ["psnr"]), "evaluation.first_stage_metrics")
    return EvaluationSpec(
        metrics=tuple(map(str, _list(node["metrics"], "evaluation.metrics"))),
        extractor=str(node["extractor"]),
        num_samples=_whole(node["num_samples"], "evaluation.num_samples", 2),
        steps=tuple(steps),
        curve_steps=_whole(node.get("curve_steps", max(steps)), "evaluation.curve_steps", 1),
        first_stage_metrics=tuple(map(str, on_first_stages)),
    )


def _mapping(node: Any, path: str, known: Sequence[str] = (), required: Sequence[str] = ()) -> dict[Any, Any]:
    if not isinstance(node, dict):
        raise ConfigError("must be a mapping", path)
    for key in node:
        if known and key not in known:
            hint = did_you_mean(str(key), known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"unknown{hint}", _at(path, str(key)))
    absent = [key for key in required if key not in node]
    if absent:
        raise ConfigError(f"{', '.join(absent)} missing", path)
    return node


def _list(node: Any, path: str) -> list[Any]:
    if not isinstance(node, list) or not node or len(set(map(str, node))) != len(node):
        raise ConfigError("must be a list of different values", path)
    return node


def is_number(value: Any) -> bool:
    """Return whether a value is a number; truth values are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any, path: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is no whole number from {least} up", path)
    return value
