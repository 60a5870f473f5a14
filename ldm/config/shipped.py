"""The configs that come with the project, by their names below `configs/`: ldm/ffhq, demo/txt2img_shapes."""

from __future__ import annotations

from pathlib import Path

SCHEMA = "# yaml-language-server: $schema="  # the line that tells an editor by which schema to complete and check
_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Return the folder of the shipped configs: that of the checkout, or that inside of the installed package."""
    checkout = _PACKAGE.parent / "configs"
    return checkout if (checkout / "_base").is_dir() else _PACKAGE / "shipped_configs"


def names() -> list[str]:
    """List the names of the configs that can be used as they are, the studies included."""
    files = (path.relative_to(folder()).with_suffix("") for path in folder().rglob("*.yaml"))
    return sorted(path.as_posix() for path in files if path.parts[0] != "_base")


def find(name: str | Path) -> str:
    """Return the file of a config: a path as it is, or the file of a shipped name where no such file exists."""
    shipped = folder() / f"{name}.yaml"
    return str(shipped) if not Path(name).exists() and shipped.is_file() else str(name)


def title(name: str) -> str:
    """Return the first sentence of the comment at the beginning of a shipped config."""
    comment = []
    for line in (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment += [] if line.startswith(SCHEMA) else [line.lstrip("# ")]
    return " ".join(comment).partition(". ")[0].rstrip(".")
