"""A study: trials that differ in named axes, what is equal for all, and how they are evaluated. Read from YAML.

    title, text   heading of the report, and what the study does and does not show
    first_stage   config of the first stage; `none` diffuses pixels; left out, the latent config's own stays as it is
    latent        config of the latent model
    set           settings of all trials, {KEY: value}. A KEY begins with
                    first_stage.  latent.     and goes on with a key of that config
                    first_stage.checkpoint    weights, in place of a training
                    latent.checkpoint         a trained model: only its samples are evaluated, and a seed is theirs
                    sample.                   and is a field of `Sampling`
    axes          name -> {value: settings}, as in `set`; `first_stage` and `latent` name other configs;
                  or name -> {key: KEY, values: [...]} where only one key changes
    seeds         of the latent trainings; first stages are trained once
    budget        fields of `Budget`, for every latent training
    evaluation    fields of `EvaluationSpec`
    claims        what papers say of the trials, a list with the fields of `Claim`; the report says whether it is seen
    workers       trainings at a time on the CPU

A study may be based on others (`base:`, see `ldm.config.files`). Paths of configs are relative to the study's file; a
checkpoint, as in every config, to the working directory. A mapping is merged into the one that is there, unless it is a
node with another target. `minutes` become steps by the speed of a short training before the real one, so that a run
keeps its length when it is interrupted or the machine is busier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ldm.bounds import Count, Ge, Natural, NonNegative, Positive
from ldm.config import trust_base
from ldm.config.check import check_value
from ldm.config.files import read_with_bases
from ldm.config.nodes import SECTIONS
from ldm.config.overrides import COMMAND_LINE, parse_override
from ldm.config.parameters import parameters_of
from ldm.config.plain import resolve
from ldm.config.targets import did_you_mean
from ldm.config.trust import is_within
from ldm.errors import ConfigError

PIXELS = "none"
_CONFIGS = ("first_stage", "latent")
_LENGTHS = ("steps", "samples", "minutes")
_LENGTH_OF_A_TRAINING = ("latent.lightning.trainer.max_steps", "latent.lightning.trainer.max_epochs")
_Object = TypeVar("_Object")
Settings = tuple[tuple[str, Any], ...]  # (dotted key, value), in the order in which they are applied


@dataclass(frozen=True)
class Budget:
    """Length of each latent training, by one of steps, samples and minutes; evaluated at `points` equal distances.

    parameters, flops: largest relative difference between the networks in their parameters, and in the FLOPs of a
    forward pass; None allows all.
    """

    steps: Positive | None = None
    samples: Positive | None = None
    minutes: Positive | None = None
    points: Count = 1
    parameters: NonNegative | None = None
    flops: NonNegative | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in _LENGTHS) != 1:
            raise ConfigError(f"give one of {', '.join(_LENGTHS)}", "budget")

    @property
    def kind(self) -> str:
        """Return which of the three is given."""
        return next(name for name in _LENGTHS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """Return its value."""
        return getattr(self, self.kind)


@dataclass(frozen=True)
class EvaluationSpec:
    """How models are evaluated.

    Args:
        metrics: of samples, named as for `ldm evaluate`.
        extractor: of features.
        num_samples: number of samples, and of reconstructions.
        steps: numbers of steps of the sampler at the end of a training.
        curve_steps: number of steps of the sampler on the way (default: the largest of `steps`).
        first_stage_metrics: of reconstructions by the first stages.
    """

    metrics: tuple[str, ...]
    extractor: str
    num_samples: Annotated[int, Ge(2)]
    steps: tuple[Count, ...] = (50,)
    curve_steps: Count | None = None
    first_stage_metrics: tuple[str, ...] = ("psnr",)

    def __post_init__(self) -> None:
        if self.curve_steps is None:
            object.__setattr__(self, "curve_steps", max(self.steps))

    @property
    def all_steps(self) -> tuple[int, ...]:
        """Return the numbers of steps at the end of a training, in order; `curve_steps` is one of them."""
        return tuple(sorted({*self.steps, self.curve_steps}))


@dataclass(frozen=True)
class Sampling:
    """How samples of an evaluation are drawn.

    Args:
        scale: of guidance.
        eta: noise of the steps, where the sampler has it.
        sampler: its name, also with options.
        H: in pixels (default: as trained).
        W: in pixels (default: as trained).
        grid: name of the grid of times (default: that of the sampler).
        guidance: other fields of `ldm.models.guidance.Guidance`; `guide`: a run, or ema:NAME for another average.
        weights: ema, raw, or the name of one of the averages of the training.
    """

    scale: float = 1.0
    eta: NonNegative | None = None
    sampler: str = "ddim"
    H: Count | None = None
    W: Count | None = None
    grid: str | None = None
    guidance: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "ema"


@dataclass(frozen=True)
class Claim:
    """What a paper says: trials with the values `better` of some axes have a better metric than those with `worse`.

    metric: as in the report, the extractor may be left out; steps: of the sampler (default: `curve_steps`).
    """

    says: str
    metric: str
    better: dict[str, Any]
    worse: dict[str, Any]
    steps: Count | None = None


_BEGINNINGS = (
    *(f"{part}.{section}" for part in _CONFIGS for section in SECTIONS),
    *(f"{part}.checkpoint" for part in _CONFIGS),
    *(f"sample.{one.name}" for one in fields(Sampling)),
)


@dataclass(frozen=True)
class Trial:
    """One value of each axis, with one seed; settings `first_stage` and `latent` name a config, or PIXELS."""

    labels: dict[str, Any]
    seed: int
    settings: Settings

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.labels.items())


@dataclass(frozen=True)
class Study:
    """The content of a study's file; `last` is applied after the settings of the axes."""

    name: str
    title: str
    settings: Settings
    axes: dict[str, dict[Any, Settings]]
    budget: Budget
    evaluation: EvaluationSpec
    text: str = ""
    seeds: tuple[Natural, ...] = (23,)
    workers: Count = 1
    last: Settings = ()
    claims: tuple[Claim, ...] = ()

    def trials(self) -> Iterator[Trial]:
        """Yield every combination of values of the axes with every seed."""
        for seed in self.seeds:
            for values in product(*self.axes.values()):
                labels = dict(zip(self.axes, values, strict=True))
                chosen = (setting for name, value in labels.items() for setting in self.axes[name][value])
                yield Trial(labels, seed, (*self.settings, *chosen, *self.last))

    def changed(self, overrides: Sequence[str]) -> Study:
        """Return the study with `KEY=VALUE` set in every trial. UserError for keys that are unknown or not theirs."""
        settings = tuple(map(parse_override, overrides))
        for key, _ in settings:
            _check_key(key, "command line")
            if key in _LENGTH_OF_A_TRAINING:
                raise ConfigError(
                    "the budget of the study says how long is trained; change it there", key, COMMAND_LINE
                )
            for axis, values in self.axes.items():
                left = [
                    [(one, value) for one, value in chosen if not is_within(one, key)] for chosen in values.values()
                ]
                if len(left) > 1 and all(chosen == left[0] for chosen in left):
                    raise ConfigError(f"makes all values of the axis {axis!r} the same", key, COMMAND_LINE)
        return replace(self, last=(*self.last, *settings))


def read(path: Path) -> Study:
    """Read a study. ConfigError names the place in the file."""
    try:
        trust_base([path])
        return _study(path, resolve(read_with_bases(path).content))
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(path)) from error


def _study(path: Path, content: dict[str, Any]) -> Study:
    known = ("title", "text", *_CONFIGS, "set", "axes", "seeds", "budget", "evaluation", "claims", "workers")
    _mapping(content, "", known, required=("title", "latent", "axes", "budget", "evaluation"))
    configs = {name: content.pop(name) for name in _CONFIGS if name in content}
    settings = _settings(configs, "", path.parent) + _settings(content.pop("set", {}), "set", path.parent)
    axes = _mapping(content["axes"], "axes").items()
    content["axes"] = {str(name): _axis(axis, f"axes.{name}", path.parent) for name, axis in axes}
    content["budget"] = make(Budget, content["budget"], "budget")
    content["evaluation"] = spec = make(EvaluationSpec, content["evaluation"], "evaluation")
    check_value(claims := content.get("claims", []), list, "claims")
    content["claims"] = tuple(_claim(claim, f"claims.{i}", content["axes"], spec) for i, claim in enumerate(claims))
    return make(Study, {**content, "name": path.stem, "settings": settings}, "")


def _claim(node: Any, path: str, axes: Mapping[str, Mapping[Any, Settings]], spec: EvaluationSpec) -> Claim:
    """Read a claim about values that the axes have, after a number of steps that is evaluated."""
    claim = make(Claim, node, path)
    for name in ("better", "worse"):
        for axis, value in _mapping(getattr(claim, name), f"{path}.{name}", tuple(axes)).items():
            if value not in axes[axis]:
                known = ", ".join(map(str, axes[axis]))
                raise ConfigError(f"the axis has no value {value}; it has {known}", f"{path}.{name}.{axis}")
    if claim.steps not in (None, *spec.all_steps):
        raise ConfigError(f"{claim.steps} is none of evaluation.steps; add it there", f"{path}.steps")
    return claim


def _axis(node: Any, path: str, folder: Path) -> dict[Any, Settings]:
    if "key" not in _mapping(node, path):
        return {value: _settings(settings or {}, f"{path}.{value}", folder) for value, settings in node.items()}
    values = _mapping(node, path, ("key", "values"), required=("key", "values"))["values"]
    check_value(values, list, f"{path}.values")
    _check_list(values, f"{path}.values")
    named = {str(value) if isinstance(value, (list, dict)) else value: value for value in values}
    return {name: _settings({node["key"]: value}, f"{path}.key", folder) for name, value in named.items()}


def _settings(node: Any, path: str, folder: Path) -> Settings:
    """Read {KEY: value}; configs come first."""
    check_value(node, dict, path)
    settings: list[tuple[str, Any]] = []
    for key, value in node.items():
        if key in _CONFIGS:
            settings.insert(0, (key, _config(value, key, _at(path, key), folder)))
        else:
            _check_key(str(key), path)
            settings.append((str(key), value))
    return tuple(settings)


def _config(value: Any, part: str, path: str, folder: Path) -> Path | str:
    if part == "first_stage" and value == PIXELS:
        return PIXELS
    if not (folder / str(value)).is_file():
        raise ConfigError(f"there is no {value} in the folder of the study", path)
    return (folder / str(value)).resolve()


def _check_key(key: str, path: str) -> None:
    """Raise ConfigError unless a key begins as one of a setting does."""
    begin = ".".join(key.split(".")[:2])
    if begin not in _BEGINNINGS:
        hint = did_you_mean(begin, _BEGINNINGS) or f"; begin with {', '.join(_BEGINNINGS)}"
        raise ConfigError(f"unknown{hint}", _at(path, key))


def make(cls: type[_Object], node: Any, path: str) -> _Object:
    """Make a dataclass of a mapping that holds its fields. ConfigError for unknown, absent and unfitting ones."""
    parameters = parameters_of(cls)
    for key, value in _mapping(node, path, parameters.names, parameters.required).items():
        check_value(value, parameters.hints[key], _at(path, key))
        if isinstance(value, list):
            _check_list(value, _at(path, key))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in node.items()})


def _check_list(values: list[Any], path: str) -> None:
    if not values:
        raise ConfigError("name at least one", path)
    if len(set(map(str, values))) != len(values):
        raise ConfigError(f"{values} must be different values", path)


def _mapping(node: Any, path: str, known: Sequence[str] = (), required: Sequence[str] = ()) -> dict[Any, Any]:
    check_value(node, dict, path)
    if not node and path.startswith("axes"):
        raise ConfigError("name at least one", path)
    for key in node:
        if known and key not in known:
            hint = did_you_mean(str(key), known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"unknown{hint}", _at(path, str(key)))
    absent = [key for key in required if key not in node]
    if absent:
        raise ConfigError(f"{', '.join(absent)} missing", path)
    return node


def _at(path: str, key: str) -> str:
    return f"{path}.{key}".lstrip(".")
