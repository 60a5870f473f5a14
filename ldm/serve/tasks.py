"""What a model draws from, one class a task: what a visitor can choose, and the request that an order makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.layout.layout_files import checked_layout
from ldm.errors import UserError
from ldm.images import palette
from ldm.models.enlargement import enlargement, input_size
from ldm.models.image_request import ImageRequest
from ldm.models.loading import LoadedModel, train_option
from ldm.models.masking import Masking
from ldm.models.tasks import (
    LayoutModel,
    PlaneModel,
    enlargement_factor,
    enlargement_request,
    hole_request,
    layout_request,
    layout_tokenizer,
    map_request,
    reads_maps,
    start_request,
)
from ldm.serve.orders import LIMITS, Order
from ldm.serve.uploads import fitted_image, hole_of, image_of, indices_of

Item = Callable[[int], Mapping[str, Any]]  # number -> item of the validation data
Size = tuple[int, int]  # (height, width)


class Task(ABC):
    """What a model draws from. takes: fields of an order that it reads; has_tiles: whether it can work on tiles."""

    name: ClassVar[str]
    takes: tuple[str, ...]
    has_tiles: ClassVar[bool] = True

    def controls(self) -> dict[str, Any]:
        """Return what can be chosen beside what all models have, as plain values."""
        return {}

    @abstractmethod
    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of one image of (height, width). UserError names the field that is wrong or missing."""


@dataclass(frozen=True)
class FromText(Task):
    """Draw from texts, or from nothing; also from an image to start from, or into a hole of one."""

    loaded: LoadedModel
    name: ClassVar[str] = "text"

    @property
    def takes(self) -> tuple[str, ...]:
        """Return texts where the model has some, and images."""
        return (*(("prompt", "negative") if self.loaded.text_keys() else ()), "image", "mask")

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of a text, of an image, or of the hole in one."""
        texts, negative = texts_of(self.loaded, order)
        if order.mask is not None:
            return replace(_filled(order, self.loaded, None, texts), negative=negative)
        return replace(_started(order, self.loaded, size, texts), negative=negative)


@dataclass(frozen=True)
class FromClass(Task):
    """Draw of a class, also from an image to start from."""

    loaded: LoadedModel
    conditioners: tuple[ClassConditioner, ...]
    name: ClassVar[str] = "class"
    takes: ClassVar[tuple[str, ...]] = ("label", "image")

    @property
    def _num_classes(self) -> int:
        return min(part.num_classes for part in self.conditioners)

    def controls(self) -> dict[str, Any]:
        """Return the number of classes, and the label that means none."""
        return {"classes": self._num_classes, "no_class": self.conditioners[0].null_label}

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of a class."""
        if order.label is None or not 0 <= order.label < self._num_classes:
            raise UserError(f"class: this model has classes 0 to {self._num_classes - 1}")
        return _started(order, self.loaded, size, {part.key: order.label for part in self.conditioners})


@dataclass(frozen=True)
class FromHole(Task):
    """Fill a hole, by a model that was trained to."""

    loaded: LoadedModel
    conditioner: Masking
    name: ClassVar[str] = "hole"

    @property
    def takes(self) -> tuple[str, ...]:
        """Return image and mask, and texts where the model has some."""
        return (*(("prompt", "negative") if self.loaded.text_keys() else ()), "image", "mask")

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of the hole in an image."""
        if order.mask is None:
            raise UserError("image, mask: this model fills holes; send an image, and paint its hole")
        texts, negative = texts_of(self.loaded, order)
        return replace(_filled(order, self.loaded, self.conditioner, texts), negative=negative)


@dataclass(frozen=True)
class FromLayout(Task):
    """Draw boxes with their classes."""

    conditioner: LayoutModel
    name: ClassVar[str] = "layout"
    takes: ClassVar[tuple[str, ...]] = ("layout",)
    has_tiles: ClassVar[bool] = False  # each would need its own part of the layout

    def controls(self) -> dict[str, Any]:
        """Return the numbers of classes and of objects."""
        tokenizer = layout_tokenizer(self.conditioner)
        return {"classes": tokenizer.num_classes, "objects": tokenizer.max_objects}

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of a layout."""
        tokenizer = layout_tokenizer(self.conditioner)
        layout = checked_layout(list(order.layout), "layout", {}, tokenizer.num_classes, tokenizer.max_objects)
        return layout_request(layout, self.conditioner, size)


@dataclass(frozen=True)
class FromMap(Task):
    """Draw a map of classes."""

    loaded: LoadedModel
    conditioner: PlaneModel
    name: ClassVar[str] = "map"
    takes: ClassVar[tuple[str, ...]] = ("map",)

    def controls(self) -> dict[str, Any]:
        """Return the number of classes with their colours, the size of a map, and the index that means no class."""
        size, num_classes = self.loaded.model.image_size, self.conditioner.in_channels
        scale = enlargement(self.loaded.model, self.conditioner)
        return {
            "classes": num_classes,
            "colours": palette(num_classes).tolist(),
            "map_size": None if size is None else input_size(size, scale),
            "no_class": self._ignore_index,
        }

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of the image of a map; its size is that of the map."""
        if order.map is None:
            raise UserError("map: this model draws maps of classes; paint one, or send a file")
        indices, scale = indices_of(order.map), enlargement(self.loaded.model, self.conditioner)
        _check_sides("map", (indices.shape[0] * scale, indices.shape[1] * scale))
        return map_request(indices, self.conditioner, self.loaded.model, self._ignore_index, "map")

    @property
    def _ignore_index(self) -> int | None:
        return train_option(self.loaded.content, "ignore_index")


@dataclass(frozen=True)
class FromSmall(Task):
    """Enlarge an image, or (factor 1) draw the one that belongs to it."""

    loaded: LoadedModel
    conditioner: PlaneModel
    factor: int
    name: ClassVar[str] = "small"
    takes: ClassVar[tuple[str, ...]] = ("image",)

    def controls(self) -> dict[str, Any]:
        """Return the enlargement."""
        return {"factor": self.factor, "key": self.conditioner.key}

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request of an image enlarged; its size is that of the image."""
        if order.image is None:
            raise UserError("image: this model enlarges images; send one")
        image = image_of(order.image, self.conditioner.in_channels, self.loaded.value_range)
        _check_sides("image", (image.shape[1] * self.factor, image.shape[2] * self.factor))
        return enlargement_request(image, self.conditioner, self.factor, self.loaded.model)


@dataclass(frozen=True)
class FromItem(Task):
    """Take all conditions of an item of the validation data, whatever they are: retrieval, several at once."""

    loaded: LoadedModel
    item: Item
    name: ClassVar[str] = "item"
    takes: ClassVar[tuple[str, ...]] = ("item",)

    def controls(self) -> dict[str, Any]:
        """Return the keys of the conditions."""
        return {"keys": [part.key for part in self.loaded.model.conditioners()]}

    def request(self, order: Order, size: Size) -> ImageRequest:
        """Return the request with the conditions of an item."""
        if order.item is None:
            raise UserError("item: this model takes conditions of the validation data; choose the number of an item")
        known = {key: value for key, value in self.item(order.item).items() if key != self.loaded.model.image_key}
        return ImageRequest(size, known)


def task_of(loaded: LoadedModel, item: Item) -> Task:
    """Return what a model draws from."""
    known = [part for part in loaded.model.conditioners() if part.entry_for((1, 1)) is None]
    texts = loaded.text_keys()
    others = [part for part in known if part.key not in texts]
    if not others:
        return FromText(loaded)
    if len(others) == 1 and isinstance(others[0], Masking) and others[0].mask_key is not None:
        return FromHole(loaded, others[0])
    if all(isinstance(part, ClassConditioner) for part in known):
        return FromClass(loaded, tuple(known))
    if len(known) == 1 and isinstance(known[0], LayoutConditioner | TokenConditioner):
        return FromLayout(known[0])
    if len(known) == 1 and isinstance(known[0], ImageConditioner | SpatialRescaler):
        if reads_maps(loaded, known[0]):
            return FromMap(loaded, known[0])
        if (factor := enlargement_factor(loaded, known[0])) is not None:
            return FromSmall(loaded, known[0], factor)
    return FromItem(loaded, item)


def check_taken(task: Task, order: Order) -> None:
    """Raise UserError for a condition, and for tiles, that would have no effect."""
    if wrong := [name for name in order.given() if name not in task.takes]:
        kinds = ", ".join(task.takes)
        raise UserError(f"{wrong[0]}: has no effect on this model, which takes {kinds}; leave it out")
    if order.tile and not task.has_tiles:
        raise UserError("tile: the page cannot cut a layout; use ldm layout2img --tile")


def texts_of(loaded: LoadedModel, order: Order) -> tuple[dict[str, str], dict[str, str] | None]:
    """Return the texts of an order, and the negative ones if there are any, by the keys of the batch."""
    keys = loaded.text_keys()
    return dict.fromkeys(keys, order.prompt), dict.fromkeys(keys, order.negative) if order.negative else None


def _started(order: Order, loaded: LoadedModel, size: Size, conditions: Mapping[str, Any]) -> ImageRequest:
    """Return the request of an image from noise, or from the image that was sent."""
    if order.image is None:
        return ImageRequest(size, conditions)
    image = fitted_image(order.image, loaded.model.in_channels, size, loaded.value_range)
    return start_request(image, loaded.model.side_multiple, conditions)


def _filled(order: Order, loaded: LoadedModel, conditioner: Masking | None, texts: Mapping[str, str]) -> ImageRequest:
    """Return the request of the hole in the image that was sent, which keeps its size."""
    image = image_of(order.image, loaded.model.in_channels, loaded.value_range)
    hole = hole_of(order.mask, tuple(image.shape[1:]))
    return hole_request(image, hole, conditioner, loaded.model.side_multiple, texts)


def _check_sides(field: str, size: tuple[Any, Any]) -> None:
    if max(size) > LIMITS["side"]:
        sides = f"{int(size[0])} x {int(size[1])}"
        raise UserError(f"{field}: would become {sides} pixels; at most {LIMITS['side']} on a side are drawn")
