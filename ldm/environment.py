"""What produced a file or a run: the time, the command, the platform and the versions of what takes part."""

import importlib.metadata
import json
import platform
import shlex
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

ENVIRONMENT = "configs/environment.json"  # of a run folder
_LONGEST = 1 << 20  # bytes of it
_PACKAGES = (
    "latent-diffusion",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "numpy",
    "omegaconf",
    "transformers",
    "tokenizers",
    "taming-transformers-rom1504",
    "lpips",
    "webdataset",
    "torch-fidelity",
)


def environment() -> dict[str, Any]:
    """Tell when, where, with which command and which versions this runs; absent packages are left out."""
    return {
        "time": datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "platform": platform.platform(),
        "versions": dict(_versions()),
    }


def recorded(run: Path) -> dict[str, Any]:
    """Return what is known of the circumstances of a run; nothing where the file is absent or damaged."""
    file = run / ENVIRONMENT
    try:
        is_ours = file.is_file() and file.stat().st_size <= _LONGEST
        content = json.loads(file.read_text(encoding="utf-8-sig")) if is_ours else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def first_name(run: Path) -> str:
    """Return the name that a run folder was made with, whatever it is called now; nothing where it is not recorded."""
    start = recorded(run).get("start")
    name = start.get("folder") if isinstance(start, dict) else None
    return name if isinstance(name, str) else ""


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
