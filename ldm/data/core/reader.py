"""What every reader of images has, over files or over a stream: a transform, and a count of what cannot be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from ldm.data.core.data_errors import DataErrors
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.transforms import CropParams, ImageTransform

__all__ = ["ImageReader"]


class ImageReader(ABC):
    """Make the `transform` of a data set from the options that YAML files give it, see `ImageTransform`."""

    def __init__(
        self,
        size: int | Sequence[int],
        crop: str = "center",
        resize: int | Literal["size", "none"] | None = "size",
        flip: float = 0.0,
        channels: int = 3,
        interpolation: str = "bicubic",
        value_range: Sequence[float] | None = None,
    ) -> None:
        self.transform = ImageTransform(size, crop, resize, flip, channels, interpolation, value_range)
        self.errors = DataErrors(0)

    @abstractmethod
    def texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts under a key without decoding images, to train a tokenizer on them."""

    def _to_tensor(self, name: str, image: DecodedImage, crop: CropParams) -> Tensor:
        if self.transform.enlarges(image):
            self.errors.note_enlarged(name, (image.height, image.width), (self.transform.height, self.transform.width))
        return self.transform.apply(image, crop)
