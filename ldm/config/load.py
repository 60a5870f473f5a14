"""A config from its files and overrides: read, merged, and checked as a whole.

Whatever is wrong is reported before anything is built, with the file that holds the mistake:

    FILE: model.params.network.params.num_head: unknown; did you mean num_heads?
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.check import check_sections
from ldm.config.files import BASE, Reading, Translate, follow_references, read_with_bases
from ldm.config.nodes import walk
from ldm.config.overrides import COMMAND_LINE, apply_overrides, overridden_path, parse_override
from ldm.config.places import allow_places
from ldm.config.plain import allow_variables, resolve, with_references
from ldm.config.trust import allow_own
from ldm.errors import ConfigError


def load(
    paths: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    check: bool = True,
    translate: Translate | None = None,
) -> DictConfig:
    """Read YAML files with what they name, merge them left to right, and apply `dotted.key=value` overrides.

    `translate` brings the result into our dialect (see `ldm.compat.load`). The sections `model` and `data` are then
    validated unless `check` is false. Raises ConfigError, naming the file (or the command line) that holds the mistake.
    """
    reading = _read(paths, overrides, translate)
    try:
        config = resolve(reading.content)
        config = config if translate is None else translate(config)
        if check:
            check_sections(config)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, reading.origin(error.path)) from error.__cause__
    return OmegaConf.create(with_references(config, reading.content))


def trust_base(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> None:
    """Allow what YAML files of one's own, and overrides beside them, name: classes, places, variables.

    What they take from others is not theirs: `base:` counts, the config of a `run:` does not. Raises ConfigError.
    """
    waiting, seen = list(paths), set()
    for key, value in map(parse_override, overrides):
        section, named = key.partition(".")[0], {key.rpartition(".")[2]: value}
        waiting += _trust({section: named} if section != key else named)
    while waiting:
        path = waiting.pop()
        if (place := os.path.realpath(path)) not in seen:
            seen.add(place)
            waiting += _trust(read_with_bases(path).content)


def _trust(content: dict[str, Any]) -> list[str]:
    """Allow what a config of one's own names; return the files that its nodes begin with."""
    values = [value for _, value in walk(content)]
    for text in values:
        if isinstance(text, str):
            allow_variables(text)
    allow_places(resolve(content, throw_on_missing=False).get("lightning"))
    mappings = [value for value in values if isinstance(value, dict)]
    allow_own(value["target"] for value in mappings if isinstance(value.get("target"), str))
    bases = [value[BASE] for value in mappings if isinstance(value.get(BASE), str)]
    return [base for base in bases if Path(base).is_file()]


def read(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), translate: Translate | None = None
) -> dict[str, Any]:
    """Read as `load` does, and return the config as it stands: unchecked, in its own dialect, `???` included.

    `translate` is for the files that nodes name. Raises ConfigError.
    """
    reading = _read(paths, overrides, translate)
    try:
        return resolve(reading.content, throw_on_missing=False)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, reading.origin(error.path)) from error.__cause__


def _read(paths: str | Path | Sequence[str | Path], overrides: Sequence[str], translate: Translate | None) -> Reading:
    reading = Reading({})
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        reading = reading.under(read_with_bases(path))
    reading = follow_references(reading, translate)
    content = apply_overrides(reading.content, overrides)
    origin = COMMAND_LINE, frozenset(map(overridden_path, overrides))
    return follow_references(Reading(content, (*reading.origins, origin)), translate)
