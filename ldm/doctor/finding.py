"""What a doctor finds: sections of a report that say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.report import Section

__all__ = ["Finding", "saved"]


@dataclass(frozen=True)
class Finding(Section):
    """A section, and its problems, a line each."""

    problems: Sequence[str] = ()

    def items(self) -> list[str]:
        """Return the lines, then the problems marked as such."""
        return [*self.lines, *(f"PROBLEM {problem}" for problem in self.problems)]


def saved(image: Image.Image, path: Path) -> Path:
    """Write an image into a folder, which is made, and return its path. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise UserError(f"--outdir: {path} cannot be written ({error.strerror or error})") from error
    return path
