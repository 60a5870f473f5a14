"""The bases of readers: options of images, items and their keys, repeats, a split by names, unreadable files.

An item is a dict: `image` float32 (C, H, W) in [-1, 1]; captions under `caption` are str, labels under `class_label`
are int.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Count, Fraction, Sides
from ldm.data.core.cache import SizedCache
from ldm.data.core.data_errors import DataErrors
from ldm.data.core.decoding import DecodedImage, MultichannelImage, image_size
from ldm.data.core.tags import ShuffledTags
from ldm.data.core.transforms import UNREADABLE, CropParams, ImageTransform, SampleKey
from ldm.errors import UserError

__all__ = ["Contents", "ImageDataset", "ImageReader", "contents_of_names", "positions_in_split"]

_SPLITS = ("all", "train", "validation")
_log = logging.getLogger(__name__)
_CACHED_PIXELS = 64 * 2**20  # decoded for `repeats`, in each worker


def positions_in_split(names: Sequence[str], split: str, validation_share: float) -> list[int]:
    """Return the positions of the files that belong to a split.

    Names are hashed, so that added files do not move the others. Where a share between 0 and 1 leaves one of the two
    splits empty, it gets the file with the nearest hash. A single file is in both, with a warning.
    """
    if split not in _SPLITS or not 0 <= validation_share <= 1:
        raise UserError(
            f"data: split {split!r} must be one of {', '.join(_SPLITS)}, validation_share {validation_share} in [0, 1]"
        )
    if split == "all":
        return list(range(len(names)))
    hashes = [
        int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") for name in names
    ]
    limit = validation_share * 2**64
    if hashes and 0 < validation_share < 1:
        if min(hashes) == max(hashes):
            _log.warning("%s is the only file: it is in the split train and in validation; give more", names[0])
            return list(range(len(names)))
        limit = min(max(limit, min(hashes) + 1), max(hashes))  # integers, so that no rounding leaves one out
    return [i for i, number in enumerate(hashes) if (number < limit) == (split == "validation")]


class Contents(NamedTuple):
    """What a data set consists of, cheap to compare with that of another day: the number of its files, and a hash.

    The hash (16 hexadecimal digits) is of the names in order, relative to the folder, so that moved data are the same.
    """

    count: int
    names: str


def contents_of_names(names: Sequence[str]) -> Contents:
    """Return the number and the hash of names."""
    return Contents(len(names), hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16])


def _num_pixels(image: DecodedImage) -> int:
    """Count the pixels, of every channel where each is an image of its own; one takes about four bytes."""
    return image.width * image.height * (len(image.planes) if isinstance(image, MultichannelImage) else 1)


class ImageReader(ABC):
    """Make the `transform` of a data set from the options that YAML files give it, see `ImageTransform`.

    tags: what is done to captions that are lists of tags, None for nothing.
    """

    def __init__(
        self,
        size: Sides,
        crop: str = "center",
        resize: Count | Literal["size", "none"] | None = "size",
        flip: Fraction = 0.0,
        channels: Count = 3,
        interpolation: str = "bicubic",
        value_range: Sequence[float] | None = None,
        tags: ShuffledTags | None = None,
    ) -> None:
        self.tags = tags
        self.transform = ImageTransform(size, crop, resize, flip, channels, interpolation, value_range)
        self.errors = DataErrors(0)

    @abstractmethod
    def texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts under a key without decoding images, to train a tokenizer on them."""

    def _shuffled(self, fields: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """Return the keys of an item with its tags shuffled. Raises UserError for tags without a caption."""
        if self.tags is None:
            return fields
        if "caption" not in fields:
            raise UserError(f"data: tags are those of captions, {type(self).__name__} has none here; leave tags out")
        return {**fields, "caption": self.tags(fields["caption"], key)}

    def _to_tensor(self, name: str, image: DecodedImage, crop: CropParams) -> Tensor:
        if self.transform.enlarges(image):
            self.errors.note_enlarged(name, (image.height, image.width), (self.transform.height, self.transform.width))
        return self.transform.apply(image, crop)


class ImageDataset(ImageReader, Dataset):
    """Map-style data set of image files. A subclass lists them with `_index`, and sets `root` or writes `_read_image`.

    `dataset[SampleKey(i, epoch, seed)]` is item i of an epoch, `dataset[i]` that of epoch 0 and seed 0. The next
    readable file replaces an unreadable one. `class_names` lists the classes by label, if labels were numbered.

    Args:
        repeats: how often an epoch contains each file, with other random crops.
        split: "train" or "validation" divides the files by a hash of their names, "all" keeps them.
        validation_share: the fraction of the files in the split "validation".
        kwargs: the options of `ImageReader`.
    """

    class_names: Sequence[str] = ()
    root: Path

    def __init__(
        self,
        size: Sides,
        repeats: Count = 1,
        split: str = "all",
        validation_share: Fraction = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        if repeats < 1:
            raise UserError(f"data: repeats {repeats} is not a positive number")
        self.repeats, self.split, self.validation_share = repeats, split, validation_share
        self.names: list[str] = []
        self._decoded: SizedCache[int, DecodedImage] = SizedCache(_CACHED_PIXELS if repeats > 1 else 0, _num_pixels)

    def _index(self, names: Iterable[str], source: str) -> list[int]:
        """Keep the files of the split; return their positions in `names`. Raises UserError if none is left."""
        names = list(names)
        kept = positions_in_split(names, self.split, self.validation_share)
        if not kept:
            part = f" in the split {self.split!r} of {len(names)}; change validation_share={self.validation_share:g}"
            raise UserError(f"{source}: no images" + (f"{part} to between 0 and 1, or give more" if names else ""))
        self._keep([names[i] for i in kept])
        return kept

    def _keep(self, names: list[str]) -> None:
        """Set the files that the data set consists of."""
        self.names, self.errors = names, DataErrors(len(names))

    @property
    def contents(self) -> Contents:
        """Return what the data set consists of."""
        return contents_of_names(self.names)

    @property
    def num_files(self) -> int:
        """Return the number of files, without repeats."""
        return len(self.names)

    def __len__(self) -> int:
        return self.num_files * self.repeats

    def __getitem__(self, index: int | SampleKey) -> dict[str, Any]:
        key = index if isinstance(index, SampleKey) else SampleKey(int(index))
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        first = key.index % self.num_files
        for step in range(self.num_files):
            file = (first + step) % self.num_files
            if self.errors.is_unreadable(file):
                continue
            rng = key.generator()  # a new one, so that an unreadable file changes no draw of its replacement
            try:
                image, fields = self._decoded.get(file, self._read_image), self._read_fields(file, rng)
                crop = self._sample_crop(image, rng)
                fields = {**fields, **self._read_crop_fields(file, image, crop, rng)}
            except UNREADABLE as error:
                self.errors.skip(file, self.names[file], error)
            else:
                self.errors.count_read()
                if fields.get("caption") == "":
                    self.errors.note_empty(file, self.names[file])
                return {"image": self._cropped(file, image, crop), **self._shuffled(fields, key)}
        first = next(iter(self.errors.first()), self.names[0])
        raise UserError(f"data: none of the {self.num_files} images can be read, the first is {first}")

    def _cropped(self, file: int, image: DecodedImage, crop: CropParams) -> Tensor:
        try:
            return self._to_tensor(self.names[file], image, crop)
        except UserError as error:
            raise UserError(f"{self.names[file]}: {error}") from error

    def _read_image(self, file: int) -> DecodedImage:
        """Decode the image of a file. Raises one of UNREADABLE if that fails."""
        return self.transform.open(self.root / self.names[file])

    def aspect_ratio(self, file: int) -> float:
        """Return width / height of the image of a file, from its header where it is a file; 1 if it is unreadable."""
        try:
            if isinstance(root := getattr(self, "root", None), Path):
                width, height = image_size(root / self.names[file])
            else:
                width, height = self._read_image(file).size
        except UNREADABLE:
            return 1.0
        return width / height

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the other keys of a file."""
        return {}

    def _sample_crop(self, image: DecodedImage, rng: np.random.Generator) -> CropParams:
        """Draw the crop of an image."""
        return self.transform.sample_crop(image, rng)

    def _read_crop_fields(
        self, file: int, image: DecodedImage, crop: CropParams, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Return the keys that depend on the crop, such as maps and boxes."""
        return {}

    def texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts under a key without decoding images, to train a tokenizer on them."""
        rng = np.random.default_rng(0)
        for file in range(self.num_files):
            try:
                value = self._read_fields(file, rng).get(key)
            except UNREADABLE as error:
                self.errors.skip(file, self.names[file], error)
                continue
            if not isinstance(value, str):
                raise UserError(f"data: {self.names[file]} has no text under {key!r}")
            yield value
