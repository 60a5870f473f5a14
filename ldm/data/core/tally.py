"""What was wrong with the samples of a data set: counted over all workers, and a limit on how much is put up with."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import get_worker_info

from ldm.data.core.decoding import Picture
from ldm.data.core.transforms import ImageTransform
from ldm.errors import UserError

__all__ = ["EMPTY_CAPTION", "Tally"]

EMPTY_CAPTION = "its caption is empty; such pictures train the model without condition"

_PROCESSES = 128  # rows of counters: one for each worker, so that none overwrites what another one counts
_NAMED, _TEXT_BYTES = 3, 240  # how many unreadable samples a summary names, and how much it says about each
_JUDGED_FROM = 20  # samples; a share of fewer says nothing
_log = logging.getLogger(__name__)


class Tally:
    """Count unreadable and enlarged pictures, empty captions and masks, in memory that the workers of a loader share.

    Each unreadable one is reported once, and the first of the others. Where more than `max_bad_fraction` of at least
    20 samples read so far were unreadable, `skip` raises UserError; None allows any number.
    """

    def __init__(self, num_files: int) -> None:
        self.max_bad_fraction: float | None = None
        self._unreadable = torch.zeros(num_files, dtype=torch.bool).share_memory_()
        self._empty = torch.zeros(num_files, dtype=torch.bool).share_memory_()
        self._enlarged = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._counts = torch.zeros(_PROCESSES, 2, dtype=torch.long).share_memory_()  # read, failed
        self._texts = torch.zeros(_NAMED, _TEXT_BYTES, dtype=torch.uint8).share_memory_()

    @property
    def num_unreadable(self) -> int:
        """Return how many files were found unreadable so far."""
        return int(self._unreadable.sum())

    def is_unreadable(self, file: int) -> bool:
        """Return whether a file was found unreadable before."""
        return bool(self._unreadable[file])

    def note_read(self) -> None:
        """Note that a file was read."""
        self._counts[_process(), 0] += 1

    def skip(self, file: int, name: str, error: Exception) -> None:
        """Note an unreadable file. Raises UserError if there are too many."""
        problem = " ".join(str(error).split()) or repr(error)
        if not self._unreadable[file]:
            number = self.num_unreadable
            if number < _NAMED:
                text = f"{name}: {problem}".encode()[:_TEXT_BYTES]
                self._texts[number, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._unreadable[file] = True
            _log.warning("%s cannot be read and is skipped: %s", name, problem)
        self._counts[_process(), 1] += 1
        read, failed = self._counts.sum(0).tolist()
        total, limit = read + failed, self.max_bad_fraction
        if limit is not None and total >= _JUDGED_FROM and failed > limit * total:
            raise UserError(
                f"data: {failed} of the first {total} samples cannot be read, more than max_bad_fraction={limit:g} "
                f"allows; first {'; '.join(self.first())}; repair or remove them, or raise data.params.max_bad_fraction"
            )

    def first(self) -> list[str]:
        """Name the first unreadable files, with what is wrong with them."""
        texts = [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace") for row in self._texts]
        return [text for text in texts if text]

    def summary(self) -> str:
        """Say in one line how many were unreadable, and which first."""
        read, failed = self._counts.sum(0).tolist()
        names = "; ".join(self.first())
        return f"{self.num_unreadable} unreadable so far ({failed} of {read + failed} times), first {names}"

    @property
    def num_empty(self) -> int:
        """Return how many files were found to have an empty text or mask so far."""
        return int(self._empty.sum())

    def note_empty(self, file: int, name: str, problem: str = EMPTY_CAPTION) -> None:
        """Note that a text or a mask is empty; the first is named."""
        if not self._empty[file]:
            if not self._empty.any():
                _log.warning("%s: %s", name, problem)
            self._empty[file] = True

    def enlarge(self, name: str, image: Picture, transform: ImageTransform) -> None:
        """Note that a picture is smaller than the size asked for."""
        if not self._enlarged[0]:
            self._enlarged[0] = True
            have, want = f"{image.height}x{image.width}", f"{transform.height}x{transform.width}"
            _log.warning("%s is %s, smaller than the size %s: such pictures are enlarged", name, have, want)


def _process() -> int:
    info = get_worker_info()
    return 0 if info is None else 1 + info.id % (_PROCESSES - 1)
