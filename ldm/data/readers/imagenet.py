"""ImageNet in the layout of ILSVRC 2012: a folder a class, named by its WordNet id, or the flat validation set.

Labels are positions in the sorted list of the 1000 ids, as in the training of the released weights (cin256, cin256-v2):
the original ranks the folders that are present, which were all 1000. Its table `index_synset.yaml`, in which 71 ids are
not in ILSVRC, is only used by an option that no published config sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.files import existing_folder, find_images, read_lines
from ldm.data.readers.imagenet_synsets import SYNSETS
from ldm.errors import UserError

__all__ = ["ImageNet"]

_ORDERS = ("ilsvrc", "released", "present")
_SYNSET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"_(\d{8})$")  # ILSVRC2012_val_00000001


class ImageNet(ImageDataset):
    """Read images with `class_label` and `synset`, the WordNet id of the class; `class_names` are the ids by label.

    Raises UserError for absent folders and labels, and for synsets that are not among the 1000.

    Args:
        root: the folder of the synset folders (n01440764/...), or of the flat validation images.
        labels: for flat images, a file of lines `NAME SYNSET` (validation_synset.txt), of lines `NAME,SYNSET ...`
            (Kaggle's LOC_val_solution.csv), or of synsets alone in the order of the images' numbers.
        label_order: "ilsvrc" counts in the official list of 1000, whatever is present; "released", which the published
            weights expect, is the same; "present" numbers the synsets that are there.
        kwargs: the options of `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
        labels: str | Path | None = None,
        label_order: str = "ilsvrc",
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        if label_order not in _ORDERS:
            raise UserError(f"ImageNet: label_order {label_order!r} is not one of {', '.join(_ORDERS)}")
        self.root = existing_folder(root)
        names = find_images(self.root)
        if labels is None:
            of_names = [self._folder_synset(name) for name in names]
        else:
            of_names = _synsets_of(names, Path(labels).expanduser())
        present = sorted(set(of_names))
        unknown = [] if label_order == "present" else sorted(set(present) - set(SYNSETS))
        if unknown:
            raise UserError(
                f"{root}: {unknown[0]} and {len(unknown) - 1} more are not among the 1000 classes of ILSVRC 2012; "
                "set label_order=present to number the classes that are there"
            )
        self.class_names = self.synsets = tuple(present) if label_order == "present" else SYNSETS
        rank = {synset: i for i, synset in enumerate(self.synsets)}
        kept = self._index(names, str(root))
        self._labels = np.array([rank[of_names[i]] for i in kept], dtype=np.int32)

    def _folder_synset(self, name: str) -> str:
        synset = next((part for part in reversed(name.split("/")[:-1]) if _SYNSET.fullmatch(part)), None)
        if synset is None:
            raise UserError(
                f"{self.root}: {name} is in no folder named by a synset such as n01440764; for the flat validation set "
                "give labels, a file of NAME SYNSET"
            )
        return synset

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        label = int(self._labels[file])
        return {"class_label": label, "synset": self.synsets[label]}


def _synsets_of(names: Sequence[str], path: Path) -> list[str]:
    """Return the synset of each image by a file of labels."""
    lines = read_lines(path, "set labels to a file of NAME SYNSET")
    if lines and all(line.isdigit() for line in lines):
        raise UserError(
            f"{path}: holds numbers, which releases count differently; give synsets, one a line, or NAME SYNSET"
        )
    if lines and all(_SYNSET.fullmatch(line) for line in lines):
        table = {f"{number:08}": synset for number, synset in enumerate(lines, start=1)}
        keys = [match.group(1) if (match := _NUMBERED.search(_stem(name))) else name for name in names]
    else:
        table, keys = _named(lines), [_stem(name) for name in names]
    absent = [name for name, key in zip(names, keys, strict=True) if key not in table]
    if absent:
        raise UserError(f"{path}: has no synset for {len(absent)} of {len(names)} images, first {absent[0]}")
    return [table[key] for key in keys]


def _named(lines: Sequence[str]) -> dict[str, str]:
    """Return the synsets by names, of the lines that begin with both; others, such as a heading, are left out."""
    parts = [re.split(r"[,\s]+", line) for line in lines]
    return {_stem(part[0]): part[1] for part in parts if len(part) > 1 and _SYNSET.fullmatch(part[1])}


def _stem(name: str) -> str:
    return Path(name).stem
