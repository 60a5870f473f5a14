"""The dialect of diffusers, both ways: configs and names of weights, for single components and whole pipelines.

Tables of rules and of renames, one file a kind of network; strings and numbers only, no tensors (those are moved by
`ldm.weights.folders`). What one side cannot say of the other is refused under the name of its field.
"""

from ldm.compat.diffusers.pipelines import CONFIG, INDEX, TEXTS, Folder, Part, index_of, read, read_json, write
from ldm.compat.diffusers.rules import Rename
from ldm.compat.diffusers.text import LDM_BERT

__all__ = [
    "CONFIG",
    "INDEX",
    "LDM_BERT",
    "TEXTS",
    "Folder",
    "Part",
    "Rename",
    "index_of",
    "read",
    "read_json",
    "write",
]
