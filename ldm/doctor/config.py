"""What a config sets: mistakes, what is left to be given, what has no effect, and how it differs from another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import compat
from ldm.config import shipped
from ldm.config.check import check_sections
from ldm.config.files import config_of_run
from ldm.config.nodes import is_node, join, walk
from ldm.config.parameters import parameters_of
from ldm.config.targets import find_target
from ldm.doctor.finding import Finding
from ldm.errors import ConfigError, UserError
from ldm.evaluation.resumable import differences
from ldm.training.plan import make_plan
from ldm.training.run_folder import new_run

__all__ = ["config_file", "examine_config", "without_effect"]

Config = dict[str, Any]
_OPEN = "???"  # a value that a config leaves to its user


def config_file(name: str) -> str:
    """Return the file of a config that a path, a shipped name or a run folder names. UserError for a folder without."""
    found = config_of_run(name) if Path(name).is_dir() else shipped.find(name)
    if found is None:
        raise UserError(f"{name}: has no config in it; name a YAML file, a shipped config or a run folder")
    return str(found)


def examine_config(name: str, overrides: Sequence[str] = (), other: str | None = None) -> Iterator[Finding]:
    """Yield what is wrong with a config, what has no effect in it, and where another one differs.

    Raises UserError for files that cannot be read or translated.
    """
    file = config_file(name)
    written = compat.read(file, overrides)
    config = compat.translate(written)
    problems = _mistakes(config)
    yield Finding(f"{name}: {sum(1 for _ in leaves(config))} values", lines=[f"file: {file}"], problems=problems)
    if missing := [path for path, value in walk(config) if value == _OPEN]:
        yield Finding("Yours to give", lines=missing)
    try:
        unused, usual = without_effect(written)
    except UserError:  # of a target, which is said above
        unused, usual = [], []
    if unused:
        yield Finding("Not used: without these lines nothing would change", lines=unused)
    if usual:
        yield Finding("As by default", lines=usual)
    if other is not None:
        found = differences(config, compat.translate(compat.read(config_file(other))))
        yield Finding(f"{name} against {other}: {len(found)} differences", lines=found)


def without_effect(written: Config) -> tuple[list[str], list[str]]:
    """Return the paths of a config, in its own words, without which the same is built, and those that say a default.

    The rule is the words': a value is left out, the rest is translated, and the results are compared.
    """
    whole, unused, usual = compat.translate(written), [], []
    bare = _bare(whole)
    for keys, value in leaves(written):
        if keys[-1] == "target" or value == _OPEN:
            continue
        path = ""
        for key in keys:
            path = join(path, key)
        try:
            rest = compat.translate(_left_out(written, keys))
            is_unused, is_usual = rest == whole, _bare(rest) == bare
        except UserError:  # it is needed
            continue
        if is_unused or is_usual:
            (unused if is_unused else usual).append(f"{path}: {value}")
    return unused, usual


def leaves(config: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the keys that lead to each value of a config that is no mapping, and the value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _mistakes(config: Config) -> list[str]:
    """Return the first mistake of a config, as far as it can be known without its open values."""
    open_values = [path for path, value in walk(config) if value == _OPEN]
    try:
        check_sections(config)
        if not open_values:
            make_plan(config, new_run("logs"), needs_data=False)
    except ConfigError as error:
        return [] if error.path in open_values else [str(error)]
    except UserError as error:
        return [str(error)]
    return []


def _left_out(config: Config, keys: Sequence[str]) -> Config:
    """Return a config without a value, and without the mappings that only led to it."""
    key, *rest = keys
    inner = _left_out(config[key], rest) if rest else None
    return {**config, key: inner} if inner else {name: value for name, value in config.items() if name != key}


def _bare(value: Any) -> Any:
    """Return a config in which nodes have no parameters that are set to their defaults."""
    if isinstance(value, list):
        return [_bare(child) for child in value]
    if not isinstance(value, Mapping):
        return value
    bare = {key: _bare(child) for key, child in value.items()}
    if is_node(value) and isinstance(bare.get("params"), Mapping):
        usual = parameters_of(find_target(value["target"])).defaults
        bare["params"] = {
            name: child for name, child in bare["params"].items() if name not in usual or not _same(child, usual[name])
        }
    return {key: child for key, child in bare.items() if child != {}}


def _same(value: Any, default: Any) -> bool:
    """Return whether a value of YAML is a default: lists may be tuples, whole numbers floats, but 1 is not true."""
    if isinstance(value, list) and isinstance(default, tuple | list):
        return len(value) == len(default) and all(map(_same, value, default))
    return isinstance(value, bool) == isinstance(default, bool) and value == default
