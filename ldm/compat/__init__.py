"""Files that others wrote, read at the border: `load` returns our dialect, whichever the files are written in.

One package or module a dialect; nothing outside of `ldm.compat` knows any of them.
"""

from ldm.compat import diffusers
from ldm.compat.compvis import TABLE, translate_node
from ldm.compat.reading import instantiate, load, read, translate

__all__ = ["TABLE", "diffusers", "instantiate", "load", "read", "translate", "translate_node"]
