"""Where the original expects what it published, for scripts that are given no model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Published:
    """Name a published model: its config as the original has it, ours of the same model, the weights, their origin."""

    config: str
    native: str
    checkpoint: str
    url: str

    def stand_in(self, options: argparse.Namespace) -> None:
        """Use it where none of --run, --config and --ckpt is given. UserError, with what to fetch, if it is absent."""
        if (options.run, options.config, options.ckpt) != (None, None, None):
            return
        if not Path(self.checkpoint).is_file():
            raise UserError(
                "no model: give --run FOLDER, or --config YAML with --ckpt FILE; for the published one fetch "
                f"{self.url} and put it at {self.checkpoint}"
            )
        options.config = self.config if Path(self.config).is_file() else str(_CONFIGS / self.native)
        options.ckpt = self.checkpoint
