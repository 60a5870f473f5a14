"""YAML files, and the files that they name: `base:` of a whole file, `base:` and `run:` of a node.

    base: ffhq.yaml                         a file, or several, merged left to right before the one that names them
    model:
      params:
        autoencoder: {base: ../autoencoder/vq_f4.yaml, checkpoint: FILE}     the node at the same path of that file
        autoencoder: {run: logs/RUN}                                         the same, with config and weights of a run

An `autoencoder` may also name a file or a run whose `model` is one. A `base` is relative to the file in which it stands
(on the command line to the working directory), a `run`, as every checkpoint, to the working directory. What else a node
has is laid over what it names. Interpolations of the named file stay as they are, and refer to the config as a whole.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import text
from ldm.config.merge import merge, set_value
from ldm.config.nodes import REFERENCE_KEYS, SECTIONS, children, join, walk
from ldm.config.overrides import COMMAND_LINE, split_key
from ldm.config.targets import did_you_mean
from ldm.config.types import mismatch
from ldm.errors import ConfigError

Config = dict[str, Any]
Translate = Callable[[Config], Config]
BASE, RUN = REFERENCE_KEYS
# Where a run folder has its config: ours, a published model, a run of the original.
CONFIGS = "configs"
CONFIGS_OF_RUNS = (f"{CONFIGS}/config.yaml", "config.yaml", f"{CONFIGS}/*-project.yaml")
_MOST_FILES = 200  # of one config, however they name each other
EVALUATIONS = "evaluations"  # its folder for the results of each evaluation


@dataclass(frozen=True)
class Reading:
    """A config as far as it is read; `origins`: its files in order of merging, each with the paths that stand in it."""

    content: Config
    origins: tuple[tuple[str, frozenset[str]], ...] = ()

    def __post_init__(self) -> None:
        if len(self.origins) > _MOST_FILES:
            raise ConfigError(f"leads to more than {_MOST_FILES} files", BASE, self.origins[-1][0])

    def under(self, above: "Reading") -> "Reading":
        """Lay another reading over this one."""
        return Reading(merge(self.content, above.content), (*self.origins, *above.origins))

    def origin(self, path: str) -> str:
        """Name the last source that holds a path or, if none does (something is missing there), its closest parent."""
        while path:
            inside = (f"{path}.", f"{path}[")
            holders = [name for name, held in self.origins if path in held]
            holders = holders or [name for name, held in self.origins if any(key.startswith(inside) for key in held)]
            if holders:
                return holders[-1]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return ", ".join(dict.fromkeys(name for name, _ in self.origins if name != COMMAND_LINE))


def read_yaml(path: str | Path) -> Config:
    """Read one YAML file as it stands, a mapping; interpolations are not resolved. Raises ConfigError."""
    path = Path(path)
    try:
        content = text.read(path)
    except FileNotFoundError:
        raise ConfigError(f"no such file{_similar(path)}", source=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", source=str(path)) from error
    except text.Damaged as error:
        raise ConfigError(str(error), source=str(path)) from None
    except ValueError as error:
        raise ConfigError(f"is not valid YAML: {error}", source=str(path)) from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"must hold a mapping with the keys {', '.join(SECTIONS)}", source=str(path))
    return content or {}


def read_with_bases(path: str | Path, chain: tuple[str, ...] = ()) -> Reading:
    """Read a YAML file over those that its `base:` names. `chain`: the files that led here, to find a circle.

    Raises ConfigError.
    """
    name = str(path)
    chain = (*chain, name)
    content = read_yaml(path)
    bases = content.pop(BASE, None) or []
    if problem := mismatch(bases, str | list[str]):
        raise ConfigError(problem, BASE, name)
    below = Reading({})
    for base in [bases] if isinstance(bases, str) else bases:
        below = below.under(read_with_bases(_existing(_beside(base, name), BASE, chain), chain))
    content = _anchored(content, name)
    return below.under(Reading(content, (_origin_of(name, content),)))


def follow_references(reading: Reading, translate: Translate | None = None, chain: tuple[str, ...] = ()) -> Reading:
    """Put in place what nodes name by `base` or `run`; `translate` brings a named file into our dialect.

    Raises ConfigError.
    """
    while found := next(_references(reading.content), None):
        reading = _follow(reading, *found, translate, chain)
    return reading


def config_of_run(run: str | Path) -> Path | None:
    """Find the config of a run folder, of a folder of a published model, or of a checkpoint in one; None without."""
    path = Path(run).expanduser()
    for folder in [path] if path.is_dir() else [path.parent, path.parent.parent]:
        for pattern in CONFIGS_OF_RUNS:
            for file in sorted(folder.glob(pattern), reverse=True):
                return file
    return None


def _references(value: Any, path: str = "", key: str = "params") -> Iterator[tuple[str, Config]]:
    """Yield the nodes that name a file or a run, the innermost first; below `params` the names are free."""
    for place, child in children(value, path):
        yield from _references(child, place, place.rpartition(".")[2])
    if isinstance(value, dict) and key != "params" and any(isinstance(value.get(name), str) for name in REFERENCE_KEYS):
        yield path, value


def _follow(reading: Reading, path: str, node: Config, translate: Translate | None, chain: tuple[str, ...]) -> Reading:
    """Replace the node at a path by what it names, under what else it has."""
    key = BASE if BASE in node else RUN
    place = join(path, key)
    holder = reading.origin(place)
    if BASE in node and RUN in node:
        raise ConfigError("names its config twice; leave out base or run", path, holder)
    chain = (*chain, holder)
    file = _config_named(node, place, chain)
    named = follow_references(read_with_bases(file, chain), translate, chain)
    at, found = _select(named.content if translate is None else translate(named.content), path)
    if found is None:
        raise ConfigError(f"{file} has no {path}", place, holder)
    if key == RUN:
        found = {name: found[name] for name in ("target", "params") if name in found} | {"checkpoint": node[RUN]}
    rest = {name: value for name, value in node.items() if name != key}
    keys = split_key(path)
    content = set_value(set_value(reading.content, keys, None), keys, merge(found, rest))
    inherited = (
        (name, frozenset(path + held.removeprefix(at) for held in paths if held.startswith(at)))
        for name, paths in named.origins
    )
    position = max(index for index, (name, _) in enumerate(reading.origins) if name == holder)
    below, above = reading.origins[:position], reading.origins[position:]
    return Reading(content, (*below, _origin_of(str(file), found, path), *inherited, *above))


def _config_named(node: Config, place: str, chain: tuple[str, ...]) -> Path:
    if BASE in node:
        return _existing(Path(node[BASE]), place, chain)
    file = config_of_run(node[RUN])
    if file is None:
        where = " or ".join(CONFIGS_OF_RUNS[:2])
        raise ConfigError(f"{node[RUN]} has no config; expected {where} in it", place, chain[-1])
    return file


def _existing(path: Path, place: str, chain: tuple[str, ...]) -> Path:
    """Return the path of a file that the last file of a chain names. ConfigError if it is absent, or in the chain."""
    route = " -> ".join(os.path.relpath(name, Path(chain[0]).parent) for name in (*chain, str(path)))
    if path.resolve() in [Path(name).resolve() for name in chain]:
        raise ConfigError(f"leads in a circle: {route}", place, chain[-1])
    if not path.is_file():
        raise ConfigError(f"no such file{_similar(path)} ({route})", place, chain[-1])
    return path


def _beside(file: str, holder: str) -> Path:
    """Return the path of a file that is named relative to the file that names it."""
    return Path(os.path.normpath(Path(holder).parent / Path(file).expanduser()))


def _anchored(value: Any, holder: str, key: str = "params") -> Any:
    """Write each `base` of a node relative to the working directory instead of relative to the file."""
    if isinstance(value, list):
        return [_anchored(child, holder, "") for child in value]
    if not isinstance(value, dict):
        return value
    anchored = {name: _anchored(child, holder, str(name)) for name, child in value.items()}
    if key != "params" and isinstance(value.get(BASE), str):
        anchored[BASE] = str(_beside(value[BASE], holder))
    return anchored


def _select(content: Config, path: str) -> tuple[str, Config | None]:
    """Return the node at a path, or None if there is none, and its path: that of a first stage may be `model`."""
    nodes = {place: value for place, value in walk(content) if isinstance(value, dict)}
    is_first_stage = str(nodes.get("model", {}).get("target", "")).endswith("Autoencoder")
    at = "model" if path not in nodes and path.endswith(".autoencoder") and is_first_stage else path
    return at, nodes.get(at)


def _origin_of(name: str, content: Any, path: str = "") -> tuple[str, frozenset[str]]:
    return name, frozenset(place for place, _ in walk(content, path))


def _similar(path: Path) -> str:
    similar = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return did_you_mean(path.name, similar)
