"""Configs of any dialect from files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm import config
from ldm.compat import compvis, first_edition
from ldm.compat.compvis import translate_node
from ldm.config.plain import plain


def translate(content: dict[str, Any]) -> dict[str, Any]:
    """Translate a config, or a single node, of any dialect into ours. Raises ConfigError."""
    return first_edition.moved(compvis.translate(first_edition.translate(content)))


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), check: bool = True) -> DictConfig:
    """Load a config as `ldm.config.load` does, ours or one written for CompVis, overridden in its own words."""
    return config.load(paths, overrides, check, translate)


def read(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config as `ldm.config.read` does: unchecked, and in the words of its files."""
    return config.read(paths, overrides, translate)


def instantiate(node: Any, path: str = "", **extra: Any) -> Any:
    """Build the object that a node of either dialect describes, as `ldm.config.instantiate` does."""
    return config.instantiate(translate_node(plain(node), path), path, **extra)
