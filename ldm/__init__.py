"""Latent diffusion models: training, sampling and evaluation.

One's own code may import modules under the names that they had in the first edition.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Moved(MetaPathFinder, Loader):
    """Find modules that have another name today; asked only for those that are not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import a module that has moved, None for any other."""
        if not fullname.startswith(f"{__name__}."):
            return None
        from ldm.compat.first_edition import MODULES

        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of one that was asked for by its old name."""
        from ldm.compat.first_edition import MODULES

        name = module.__name__
        logging.getLogger(__name__).warning("%s is %s now; import it by that name", name, MODULES[name])
        sys.modules[name] = importlib.import_module(MODULES[name])


sys.meta_path.append(_Moved())
