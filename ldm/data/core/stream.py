"""What a data set needs to be streamed: its own order, and decoding apart from reading."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ldm.data.core.data_errors import DataErrors
from ldm.data.core.sampler import ResumableSampler

__all__ = ["BatchDecoder", "Stream"]


class BatchDecoder(Protocol):
    """The map-style side of a stream, which runs in the workers of a loader."""

    def __getitems__(self, samples: list[Any]) -> list[dict[str, Any]]:
        """Decode the samples of a batch."""


@runtime_checkable
class Stream(Protocol):
    """An iterable data set whose samples a `ResumableSampler` reads in the main process and workers decode."""

    errors: DataErrors

    def sampler(self, batch_size: int, seed: int, shuffle: bool, evaluation: bool) -> ResumableSampler:
        """Make the sampler that reads undecoded samples, in the order of an epoch."""

    def decoder(self, evaluation: bool) -> BatchDecoder:
        """Make what decodes them."""
