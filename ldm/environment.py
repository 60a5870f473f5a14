"""What produced a file: the time, the command, the platform and the versions of what takes part."""

import importlib.metadata
import platform
import shlex
import sys
from datetime import datetime
from functools import cache
from typing import Any

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


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
