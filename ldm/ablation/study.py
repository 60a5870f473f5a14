"""A study: what is compared, what stays equal, and how it is judged. Read from configs/ablation/*.yaml.

    title, text   heading of the report, and what the study does and does not show
    first_stage   {base: YAML, set: {dotted.key: value}, checkpoint: FILE}; a checkpoint is used in place of a training;
                  `none` diffuses pixels; left out, the latent config's own autoencoder stays as it is
    latent        {base: YAML, set: {dotted.key: value}}
    sample        {scale, eta, sampler, H, W} of the evaluation
    axes          name -> {value: {first_stage, latent, sample}}, laid over the above,
                  or name -> {key: latent.DOTTED.KEY, values: [...]} where only one key changes
    seeds         of the latent trainings; first stages are trained once
    budget        one of steps, samples, minutes, the same for every latent training; points: how often it is judged on
                  the way; parameters: largest relative difference between the sizes of the U-Nets, unchecked if absent
    evaluation    metrics, first_stage_metrics, extractor, num_samples, steps (of DDIM, at the end), curve_steps (on the
                  way)
    workers       trainings at a time on the CPU

Paths of configs are relative to the study's file; a checkpoint, as in every config, to the working directory.
`minutes` are turned into steps by the pace of a short training before the real one, so that a run keeps its length when
it is interrupted or the machine is busier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.config.files import read_yaml
from ldm.config.overrides import parse_override
from ldm.config.plain import resolve
from ldm.config.targets import did_you_mean
from ldm.errors import ConfigError, UserError

BUDGETS = ("steps", "samples", "minutes")
_PARTS = ("first_stage", "latent", "sample")
_RECIPES = {"first_stage": ("base", "set", "checkpoint"), "latent": ("base", "set")}
_SAMPLE = ("scale", "eta", "sampler", "H", "W")
PIXELS = "none"


@dataclass(frozen=True)
class Recipe:
    """Name a config and what is changed in it, (dotted key, value) in order; `pixels`: no first stage at all.

    A mapping is merged into the one that is there, unless it is a node with a target of its own.
    """

    base: Path | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    checkpoint: str | None = None
    pixels: bool = False

    def over(self, below: Recipe) -> Recipe:
        """Lay this recipe over another one; another base starts afresh."""
        if self.pixels or self.base is not None:
            return self
        settings = (*below.settings, *self.settings)
        return Recipe(below.base, settings, self.checkpoint or below.checkpoint, below.pixels)


@dataclass(frozen=True)
class Point:
    """Say what one value of an axis changes."""

    first_stage: Recipe = Recipe()
    latent: Recipe = Recipe()
    sample: Mapping[str, float] = field(default_factory=dict)

    def over(self, below: Point) -> Point:
        """Lay this point over another one."""
        stages = self.first_stage.over(below.first_stage), self.latent.over(below.latent)
        return Point(*stages, {**below.sample, **self.sample})


@dataclass(frozen=True)
class Budget:
    """Say how long each latent training is: an amount of one of BUDGETS, judged at `points` equal distances."""

    kind: str
    amount: float
    points: int = 1
    parameters: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Say how models are judged: `steps` of DDIM at the end of a training, `curve_steps` on the way."""

    metrics: tuple[str, ...]
    extractor: str
    num_samples: int
    steps: tuple[int, ...] = (50,)
    curve_steps: int = 50
    first_stage_metrics: tuple[str, ...] = ("psnr",)


@dataclass(frozen=True)
class Trial:
    """One point of the grid of axes with one seed."""

    labels: Mapping[str, Any]
    seed: int
    point: Point

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.labels.items())


@dataclass(frozen=True)
class Study:
    """Hold a study as it stands in its file."""

    name: str
    title: str
    text: str
    point: Point
    axes: Mapping[str, Mapping[Any, Point]]
    seeds: tuple[int, ...]
    budget: Budget
    judgement: Judgement
    workers: int
    last: Point = Point()  # laid over everything

    def trials(self) -> Iterator[Trial]:
        """Yield every combination of values of the axes with every seed."""
        for seed in self.seeds:
            for values in product(*self.axes.values()):
                labels, point = dict(zip(self.axes, values, strict=True)), self.point
                for name, value in labels.items():
                    point = self.axes[name][value].over(point)
                yield Trial(labels, seed, self.last.over(point))

    def changed(self, overrides: Sequence[str]) -> Study:
        """Return the study with `first_stage.KEY=VALUE` and `latent.KEY=VALUE` laid over every trial."""
        settings: dict[str, dict[str, Any]] = {"first_stage": {}, "latent": {}}
        for override in overrides:
            part, _, rest = override.partition(".")
            if part not in settings or rest.startswith("=") or "=" not in rest:
                raise UserError(f"{override!r}: write first_stage.KEY=VALUE or latent.KEY=VALUE")
            key, value = parse_override(rest)
            settings[part][key] = value
        stages = (Recipe(settings=tuple(part.items())) for part in settings.values())
        return replace(self, last=Point(*stages).over(self.last))


def read(path: Path) -> Study:
    """Read a study. ConfigError names the place in the file."""
    try:
        return _study(path, resolve(read_yaml(path)))
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(path)) from error


def _study(path: Path, content: Any) -> Study:
    known = ("title", "text", *_PARTS, "axes", "seeds", "budget", "evaluation", "workers")
    content = _mapping(content, "", known, required=("title", "latent", "axes", "budget", "evaluation"))
    axes = _mapping(content["axes"], "axes")
    if not axes:
        raise ConfigError("name at least one axis", "axes")
    return Study(
        name=path.stem,
        title=str(content["title"]),
        text=str(content.get("text", "")),
        point=_point({name: content[name] for name in _PARTS if name in content}, "", path.parent),
        axes={str(name): _axis(axis, f"axes.{name}", path.parent) for name, axis in axes.items()},
        seeds=tuple(_whole(seed, "seeds", 0) for seed in _list(content.get("seeds", [23]), "seeds")),
        budget=_budget(content["budget"]),
        judgement=_judgement(content["evaluation"]),
        workers=_whole(content.get("workers", 1), "workers", 1),
    )


def _axis(node: Any, path: str, folder: Path) -> dict[Any, Point]:
    node = _mapping(node, path)
    if "key" not in node:
        if not node:
            raise ConfigError("name at least one value", path)
        return {value: _point(point or {}, f"{path}.{value}", folder) for value, point in node.items()}
    node = _mapping(node, path, ("key", "values"), required=("key", "values"))
    part, _, key = str(node["key"]).partition(".")
    if part not in _PARTS or not key:
        raise ConfigError(
            f"{node['key']!r}: begin with one of {', '.join(f'{part}.' for part in _PARTS)}", f"{path}.key"
        )
    values = _list(node["values"], f"{path}.values")
    changes = {_label(value): {key: value} if part == "sample" else {"set": {key: value}} for value in values}
    return {label: _point({part: change}, f"{path}.{label}", folder) for label, change in changes.items()}


def _label(value: Any) -> Any:
    """Name a value of an axis: itself, or as text if it is a list or a mapping."""
    return str(value) if isinstance(value, (list, dict)) else value


def _point(node: Any, path: str, folder: Path) -> Point:
    node = _mapping(node, path, _PARTS)
    sample = _mapping(node.get("sample") or {}, f"{path}.sample".lstrip("."), _SAMPLE)
    return Point(*(_recipe(node.get(part), part, f"{path}.{part}".lstrip("."), folder) for part in _RECIPES), sample)


def _recipe(node: Any, part: str, path: str, folder: Path) -> Recipe:
    if part == "first_stage" and node == PIXELS:
        return Recipe(pixels=True)
    node = _mapping({} if node is None else node, path, _RECIPES[part])
    base = None if node.get("base") is None else (folder / str(node["base"])).resolve()
    if base is not None and not base.is_file():
        raise ConfigError(f"there is no {node['base']} beside the study", f"{path}.base")
    return Recipe(base, tuple(_mapping(node.get("set") or {}, f"{path}.set").items()), node.get("checkpoint"))


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


def _judgement(node: Any) -> Judgement:
    known = tuple(Judgement.__dataclass_fields__)
    node = _mapping(node, "evaluation", known, required=("metrics", "extractor", "num_samples"))
    steps = _list(node.get("steps", [50]), "evaluation.steps")
    on_first_stages = _list(node.get("first_stage_metrics", ["psnr"]), "evaluation.first_stage_metrics")
    return Judgement(
        metrics=tuple(map(str, _list(node["metrics"], "evaluation.metrics"))),
        extractor=str(node["extractor"]),
        num_samples=_whole(node["num_samples"], "evaluation.num_samples", 2),
        steps=tuple(_whole(count, "evaluation.steps", 1) for count in steps),
        curve_steps=_whole(node.get("curve_steps", max(steps)), "evaluation.curve_steps", 1),
        first_stage_metrics=tuple(map(str, on_first_stages)),
    )


def _mapping(node: Any, path: str, known: tuple[str, ...] = (), required: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(node, dict):
        raise ConfigError("must be a mapping", path)
    for key in node:
        if known and key not in known:
            raise ConfigError(
                f"unknown{did_you_mean(str(key), known) or '; known are ' + ', '.join(known)}", f"{path}.{key}"
            )
    absent = [key for key in required if key not in node]
    if absent:
        raise ConfigError(f"{', '.join(absent)} missing", path)
    return node


def _list(node: Any, path: str) -> list[Any]:
    if not isinstance(node, list) or not node or len(set(map(str, node))) != len(node):
        raise ConfigError("must be a list of different values", path)
    return node


def is_number(value: Any) -> bool:
    """Tell numbers from all else, truth values included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any, path: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is no whole number from {least} up", path)
    return value
