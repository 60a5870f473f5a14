"""YAML to objects: read, merge, override, check, build.

A node is `{target: import.path, params: {...}}`, and may carry `checkpoint: PATH` with `ignore_keys: [PREFIX, ...]` to
fill the module with weights once it is built. Nodes nest anywhere inside `params`, also in lists. A file may be based
on others, and a node may name another file or a run in place of its target (see `ldm.config.files`). Which targets may
be called says `ldm.config.trust`.

Configs written for CompVis are read by `ldm.compat.load`; nothing here knows their dialect.
"""

from ldm.config.build import instantiate
from ldm.config.check import validate
from ldm.config.load import load, read, trust_base
from ldm.config.trust import allow
from ldm.errors import ConfigError

__all__ = ["ConfigError", "allow", "instantiate", "load", "read", "trust_base", "validate"]
