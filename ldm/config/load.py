"""A config from its files and overrides: read, merged, and checked as a whole.

Whatever is wrong is reported before anything is built, with the file that holds the mistake:

    FILE: model.params.network.params.num_head: unknown; did you mean num_heads?
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.config.check import check_sections
from ldm.config.files import Reading, Translate, follow_references, read_with_bases
from ldm.config.overrides import COMMAND_LINE, apply_overrides, overridden_path
from ldm.config.plain import resolve, with_references
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
    return with_references(config, reading.content)


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
