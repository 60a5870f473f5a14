"""Images to measure, by position: of a data set through its own transform, or of a folder; all measured as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ldm import compat, config, distributed
from ldm.data.core.decoding import UNREADABLE, open_image
from ldm.data.core.files import find_images
from ldm.data.core.loader import collate
from ldm.data.core.module import errors_of
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.core.transforms import ImageTransform
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError

ROUNDING = "uint8, (x + 1) * 127.5 rounded to nearest and clamped"
SPLIT = "data.params."  # before the name of a split of a config's data
_PART = 256  # images that are hashed together


class ImageSet:
    """Items of a data set by position: at most `limit`, evenly spaced where it has more.

    Of a stream the first `limit` are read once and kept in memory. UserError for an empty set and for unreadable
    images, unless `replaces`: they are then replaced as in training.
    """

    def __init__(self, dataset: Dataset, name: str, limit: int | None = None, replaces: bool = False) -> None:
        is_stream = isinstance(dataset, IterableDataset)
        self.name, self._tally = name, None if replaces else errors_of(dataset)
        self.dataset: Any = [_packed(item) for item in islice(iter(dataset), limit)] if is_stream else dataset
        self._check_readable()
        self.available = len(self.dataset)
        if not self.available:
            raise UserError(f"{name}: has no images")
        self.count = self.available if limit is None else min(limit, self.available)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return (C, H, W) of the images."""
        return tuple(self._item(0)["image"].shape)

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return the batch of these positions, modulo the number of items. UserError for images of several sizes."""
        items = [self._item(p % self.count * self.available // self.count) for p in positions]
        self._check_readable()
        sizes = sorted({self.shape, *(tuple(item["image"].shape) for item in items)})
        if len(sizes) > 1:
            shown = ", ".join("x".join(map(str, size)) for size in sizes[:3])
            raise UserError(f"{self.name}: images of several sizes ({shown}); give the data set one `size`")
        return collate(items)

    def digest(self) -> str:
        """Return the SHA-256 of the bytes of all images, in order; computed once, divided among ranks."""
        return self._digests[0]

    def data_digest(self) -> str:
        """Return the SHA-256 of images and all other entries: texts, labels, boxes, ..."""
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, str]:
        rank, world = distributed.rank(), distributed.world_size()
        own = {}
        for number, first in enumerate(range(0, self.count, _PART)):
            if number % world == rank:
                batch = self.batch(range(first, min(first + _PART, self.count)))
                images = to_bytes(batch.pop("image"))
                pixels = hashlib.sha256(str(images.shape[1:]).encode() + images.numpy().tobytes())
                own[number] = pixels.digest(), _sha256(_content(batch), pixels.digest())
        gathered: list[Any] = [own]
        if world > 1:
            gathered = [None] * world
            torch.distributed.all_gather_object(gathered, own)
        joined = {number: digests for part in gathered for number, digests in part.items()}
        columns = zip(*(joined[number] for number in sorted(joined)), strict=True)
        image_digest, data_digest = (hashlib.sha256(b"".join(column)).hexdigest() for column in columns)
        return image_digest, data_digest

    def _item(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if "image" not in item:
            raise UserError(f"{self.name}: items have no 'image', they have {', '.join(map(str, item))}")
        return {**item, "image": from_bytes(item["image"])} if item["image"].dtype == torch.uint8 else item

    def _check_readable(self) -> None:
        if self._tally is not None and self._tally.num_unreadable:
            first = next(iter(self._tally.first()), "an image")
            raise UserError(f"{self.name}: {first}: cannot be read; repair or remove it, so that all are measured")


class _UnscaledFolder(Dataset):
    """The images below a folder, or of one file, at their own sizes."""

    def __init__(self, place: str) -> None:
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError(f"images {place}: no such file or folder")
        self.paths = [path] if path.is_file() else [path / file for file in find_images(path, arrays=True)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        try:
            image = open_image(path, 3)
            transform = ImageTransform([image.height, image.width], crop="none")
            return {"image": from_bytes(to_bytes(transform(image, np.random.default_rng(0))))}
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read ({error}); repair or remove it, then start again") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def folder_images(place: str, limit: int | None = None) -> ImageSet:
    """Return the images of a folder, or of one file, at their own size."""
    return ImageSet(_UnscaledFolder(place), place, limit)


def scaled_folder_images(
    place: str, size: tuple[int, int], limit: int | None = None, value_range: Sequence[float] | None = None
) -> ImageSet:
    """Return the images of a folder scaled and cropped to `size`, as data sets do by default."""
    images = ImageFolder(place, size=list(size), value_range=value_range)
    return ImageSet(images, f"{place}, its centres at {size[0]}x{size[1]}", limit)


def split_images(content: Mapping[str, Any], split: str, limit: int | None = None, replaces: bool = False) -> ImageSet:
    """Return the images of a split of the data that a config describes. UserError if it has no such split."""
    data = compat.translate_node({key: (content.get("data") or {}).get(key) for key in ("target", "params")}, "data")
    place, node = f"{SPLIT}{split}", (data.get("params") or {}).get(split)
    if not isinstance(node, dict):
        raise UserError(f"{place}: the config has none; name a folder or an .npz file as reference")
    config.validate(node, place)
    return ImageSet(config.instantiate(node, place), place, limit, replaces)


def _sha256(content: Iterator[bytes], start: bytes) -> bytes:
    digest = hashlib.sha256(start)
    for piece in content:
        digest.update(piece)
    return digest.digest()


def _content(value: Any) -> Iterator[bytes]:
    """Yield the content of tensors, texts, numbers, and lists and dicts of them, as bytes."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value):
            yield repr(key).encode()
            yield from _content(value[key])
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for entry in value:
            yield from _content(entry)
    else:
        yield repr(value).encode()


def _packed(item: dict[str, Any]) -> dict[str, Any]:
    """Return the item with its image as bytes, a quarter of the memory, where that loses nothing."""
    if "image" not in item:
        return item
    image = to_bytes(item["image"])
    return {**item, "image": image} if torch.equal(from_bytes(image), item["image"]) else item
