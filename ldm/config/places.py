"""Where the section `lightning` may let a run write: into its own folder, and where somebody here said so.

A config may come with a stranger's run. `--allow path:FOLDER` says so, or YAML of one's own that names the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.allowance import PLACE, add, lies_in, may_write
from ldm.config.nodes import walk
from ldm.errors import ConfigError, shown

_FOLDERS = ("directory", "dirpath", "folder", "save_dir", "dir", "root_dir", "log_dir")  # relative ones count, too


def check_places(lightning: Mapping[str, Any], run: Path) -> None:
    """Raise ConfigError for a place outside the folder of the run that is not allowed."""
    for path, place in _places(lightning, "lightning"):
        is_address, folder = "://" in place and not place.startswith("file:"), place.removeprefix("file:")
        if not may_write(folder) and (is_address or not lies_in(folder, run)):
            problem = "is no file" if is_address else "lies outside of the run"
            hint = f"leave it out, or if you trust the config, give --allow {PLACE}{shown(folder, 80)}"
            raise ConfigError(f"{shown(place, 80)} {problem}; {hint}", path)


def allow_places(lightning: Any) -> None:
    """Allow the places that this section names in YAML of one's own."""
    for _, place in _places(lightning, "lightning"):
        add(f"{PLACE}{place.removeprefix('file:')}")


def _places(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield what names a folder or a file somewhere, with its place in the config."""
    for place, text in walk(value, path):
        if isinstance(text, str) and (place.rpartition(".")[2] in _FOLDERS or _is_elsewhere(text)):
            yield place, text


def _is_elsewhere(text: str) -> bool:
    return text.startswith(("/", "~")) or ".." in Path(text).parts or "://" in text
