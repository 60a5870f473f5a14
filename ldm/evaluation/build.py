"""Metrics and extractors by the names of a command line or a YAML file: NAME, NAME:option=value, or a dotted target.

Each room that offers some has a module of `PROVIDERS` with two tables, METRICS and EXTRACTORS: name -> dotted target.
They are imported when a name is looked up, so that this room depends on none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from ldm.config.overrides import parse_override
from ldm.config.parameters import parameters_of
from ldm.config.targets import did_you_mean, find_target
from ldm.config.types import mismatch
from ldm.errors import UserError
from ldm.evaluation.distributions import DistributionMetric
from ldm.evaluation.image_metrics import FunctionMetric, Metric
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.names import USUAL_NAMES
from ldm.pairs import pairs_of

PROVIDERS = ("ldm.evaluation.names", "ldm.toy.names")


def known_names(table: str) -> dict[str, str]:
    """Return the table METRICS or EXTRACTORS of all providers: name -> dotted target."""
    return {name: target for room in PROVIDERS for name, target in getattr(import_module(room), table).items()}


def build_from_spec(spec: str, known: Mapping[str, str], option: str, **offered: Any) -> Any:
    """Make what `name`, `name:key=value,key=value`, or a dotted target with the same options names.

    offered: values that are passed on where there is such a parameter. What is no class is returned as it is. UserError
    for unknown names, parameters and values.
    """
    name, _, rest = spec.partition(":")
    if name not in known and "." not in name:
        hint = _usual(name) or did_you_mean(name, known) or f"; known are {', '.join(known)}"
        raise UserError(f"{option} {name}: unknown{hint}; or write a dotted target")
    target = find_target(known.get(name, name), option, is_called=False)
    given = pairs_of(rest.split(","), f"{option} {name}")
    if not isinstance(target, type):
        if given:
            raise UserError(f"{option} {spec}: {name} takes no options")
        return target
    parameters = parameters_of(target)
    unknown = [key for key in given if key not in parameters.names]
    if unknown:
        takes = ", ".join(parameters.names) or "nothing"
        raise UserError(f"{option} {spec}: {unknown[0]} is unknown; {name} takes {takes}")
    hints = parameters.hints
    values = {key: _value(text, key, hints.get(key, Any), f"{option} {spec}") for key, text in given.items()}
    values = {key: value for key, value in offered.items() if key in parameters.names} | values
    missing = [key for key in parameters.required if key not in values]
    if missing:
        raise UserError(f"{option} {spec}: {missing[0]} is missing; write {name}:{missing[0]}=VALUE")
    return target(**values)


def _usual(name: str) -> str:
    """Return, for FID and others of that kind, what it is called here; it depends on the extractor."""
    found = [item for item in USUAL_NAMES.items() if item[1].of_samples.lower() == name.lower()]
    return "".join(f"; {usual.of_samples} is {metric} with the extractor {usual.extractor}" for metric, usual in found)


def _value(text: str, key: str, annotation: Any, place: str) -> Any:
    _, value = parse_override(f"{key}={text}")
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
        raise UserError(f"{place}: {value} is not a positive number")
    problem = mismatch(value, annotation)
    if problem:
        raise UserError(f"{place}: {key}: {problem}")
    return value


def make_metric_suite(specs: Sequence[str], extractor: str | None, device: torch.device, keep: int) -> MetricSuite:
    """Make metrics, and the extractor if one of them needs it. UserError for unknown ones, and for one named twice."""
    sets: dict[str, DistributionMetric] = {}
    images: dict[str, Any] = {}
    for spec in specs:
        metric = build_from_spec(spec, known_names("METRICS"), "metrics", device=device)
        table, name = (sets, metric.name) if isinstance(metric, DistributionMetric) else (images, spec)
        if name in table:
            raise UserError(f"metrics {spec}: {name} is asked for twice; name it once")
        if not callable(metric):
            raise UserError(f"metrics {spec}: is no metric; it cannot be called with images and their batch")
        table[name] = metric if isinstance(metric, Metric) else FunctionMetric(metric)
    if sets and extractor is None:
        raise UserError(f"extractor: {', '.join(sets)} need one of {', '.join(known_names('EXTRACTORS'))}")
    made = build_from_spec(extractor, known_names("EXTRACTORS"), "extractor").to(device) if sets else None
    return MetricSuite(sets, made, images, keep)
