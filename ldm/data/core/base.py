"""What all readers of pictures share: the batch contract, repeats, a validation split by name, unreadable files.

An item is a dict: `image` float32 (C, H, W) in [-1, 1], every other key by its name (text as str, class labels as int).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.bounds import Count, Fraction
from ldm.data.core.decoding import Picture, Planes
from ldm.data.core.tally import Tally
from ldm.data.core.transforms import UNREADABLE, Draw, ImageTransform, View
from ldm.errors import UserError

__all__ = ["ImageDataset", "in_split"]

_SPLITS = ("all", "train", "validation")
_KEPT_PIXELS = 64 * 2**20  # of decoded pictures that repeats show again, in each worker


def in_split(name: str, split: str, validation_share: float) -> bool:
    """Return whether a file belongs to a split; decided by a hash of its name, so that added files move no other."""
    if split not in _SPLITS or not 0 <= validation_share <= 1:
        raise UserError(
            f"data: split {split!r} must be one of {', '.join(_SPLITS)}, validation_share {validation_share} in [0, 1]"
        )
    digest = hashlib.sha256(name.encode()).digest()[:8]
    is_validation = int.from_bytes(digest, "big") < validation_share * 2**64
    return split == "all" or is_validation == (split == "validation")


class _Decoded:
    """Keep the pictures decoded last, up to a number of pixels in all."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels, self._pixels = max_pixels, 0
        self._images: OrderedDict[int, Picture] = OrderedDict()

    def get(self, file: int, decode: Callable[[int], Picture]) -> Picture:
        """Return the picture of a file, decoding it if it is not kept."""
        if file not in self._images:
            image = decode(file)
            self._images[file] = image
            self._pixels += _num_values(image)
            while self._pixels > self.max_pixels and self._images:
                _, oldest = self._images.popitem(last=False)
                self._pixels -= _num_values(oldest)
            return image
        self._images.move_to_end(file)
        return self._images[file]


def _num_values(image: Picture) -> int:
    """Count the pixels, of each plane where a picture is kept in planes; either takes four bytes."""
    return image.width * image.height * (len(image.planes) if isinstance(image, Planes) else 1)


class ImageDataset(Dataset, ABC):
    """Map-style data set of files; a subclass lists them by `_index` and says how one is read.

    `dataset[i]` is the i-th item of epoch 0 with seed 0; `dataset[Draw(i, epoch, seed)]` any other. An unreadable file
    is replaced by the next readable one. `class_names` lists what labels stand for, if names were numbered. `repeats`
    shows every file so often per epoch, with other random crops.
    `split` "train" or "validation" keeps the files whose hashed name is outside or inside the share. For the other
    options see `ImageTransform`.
    """

    class_names: Sequence[str] = ()

    def __init__(
        self,
        size: Count | Sequence[Count],
        crop: str = "center",
        resize: Count | Literal["size", "none"] | None = "size",
        flip: Fraction = 0.0,
        channels: Count = 3,
        interpolation: str = "bicubic",
        repeats: Count = 1,
        split: str = "all",
        validation_share: Fraction = 0.05,
        value_range: Sequence[float] | None = None,
    ) -> None:
        if repeats < 1:
            raise UserError(f"data: repeats {repeats} is not a positive number")
        self.transform = ImageTransform(size, crop, resize, flip, channels, interpolation, value_range)
        self.repeats, self.split, self.validation_share = repeats, split, validation_share
        self.names: list[str] = []
        self.tally = Tally(0)
        self._decoded = _Decoded(_KEPT_PIXELS if repeats > 1 else 0)

    def _index(self, names: Iterable[str], source: str) -> list[int]:
        """Keep the files of the split; return their positions in `names`. Raises UserError if none is left."""
        names = list(names)
        kept = [i for i, name in enumerate(names) if in_split(name, self.split, self.validation_share)]
        if not kept:
            hint = "" if not names else f" in the split {self.split!r} of {len(names)}; change validation_share"
            raise UserError(f"{source}: no pictures{hint}")
        self.names = [names[i] for i in kept]
        self.tally = Tally(len(kept))
        return kept

    @property
    def num_files(self) -> int:
        """Return the number of files, repeats not counted."""
        return len(self.names)

    @property
    def num_unreadable(self) -> int:
        """Return how many files were found unreadable so far, in all workers of this machine."""
        return self.tally.num_unreadable

    @property
    def num_empty(self) -> int:
        """Return how many files were found to have an empty caption or mask so far, in all workers of this machine."""
        return self.tally.num_empty

    def __len__(self) -> int:
        return self.num_files * self.repeats

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        draw = index if isinstance(index, Draw) else Draw(int(index))
        if not 0 <= draw.index < len(self):
            raise IndexError(draw.index)
        first = draw.index % self.num_files
        for step in range(self.num_files):
            file = (first + step) % self.num_files
            if self.tally.is_unreadable(file):
                continue
            rng = draw.generator()  # anew, so that what was drawn for an unreadable file changes nothing
            try:
                image, fields = self._decoded.get(file, self._read_image), self._read_fields(file, rng)
                view = self._view(image, rng)
                fields = {**fields, **self._read_seen_fields(file, image, view, rng)}
            except UNREADABLE as error:
                self.tally.skip(file, self.names[file], error)
            else:
                self.tally.note_read()
                if fields.get("caption") == "":
                    self.tally.note_empty(file, self.names[file])
                return {"image": self._shown(file, image, view), **fields}
        first = next(iter(self.tally.first()), self.names[0])
        raise UserError(f"data: none of the {self.num_files} pictures can be read, the first is {first}")

    def _shown(self, file: int, image: Picture, view: View) -> torch.Tensor:
        if self.transform.enlarges(image):
            self.tally.enlarge(self.names[file], image, self.transform)
        try:
            return self.transform.show(image, view)
        except UserError as error:
            raise UserError(f"{self.names[file]}: {error}") from error

    @abstractmethod
    def _read_image(self, file: int) -> Picture:
        """Decode the picture of a file; one of UNREADABLE if it cannot be."""

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the other keys of a file."""
        return {}

    def _view(self, image: Picture, rng: np.random.Generator) -> View:
        """Draw which part of a picture is shown."""
        return self.transform.view(image, rng)

    def _read_seen_fields(self, file: int, image: Picture, view: View, rng: np.random.Generator) -> dict[str, Any]:
        """Return the keys that depend on which part of the picture is shown, such as maps and boxes."""
        return {}

    def texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts under a key without reading pictures, for a tokenizer to be trained on."""
        rng = np.random.default_rng(0)
        for file in range(self.num_files):
            try:
                value = self._read_fields(file, rng).get(key)
            except UNREADABLE as error:
                self.tally.skip(file, self.names[file], error)
                continue
            if not isinstance(value, str):
                raise UserError(f"data: {self.names[file]} has no text under {key!r}")
            yield value
