"""Default paths of the published models, used when no --run, --config and --ckpt is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ldm.cli.options import SamplingOptions
from ldm.config import shipped
from ldm.errors import UserError


@dataclass(frozen=True)
class Published:
    """A published model: its config as the original has it, ours of the same model, the weights, their origin."""

    config: str
    native: str
    checkpoint: str
    url: str

    def apply_default(self, options: SamplingOptions) -> SamplingOptions:
        """Return options with this model where none is given. UserError, with what to fetch, if it is absent."""
        source = options.model.source
        if (source.run, source.config, source.checkpoint) != (None, None, None):
            return options
        if not Path(self.checkpoint).is_file():
            raise UserError(
                "no model: give --run FOLDER, or --config YAML with --ckpt FILE; for the published one fetch "
                f"{self.url} and put it at {self.checkpoint}"
            )
        config = self.config if Path(self.config).is_file() else str(shipped.folder() / self.native)
        source = replace(source, config=config, checkpoint=self.checkpoint)
        return replace(options, model=replace(options.model, source=source))
