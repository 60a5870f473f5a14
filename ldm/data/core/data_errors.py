"""Count unreadable samples across workers, and stop the run above `max_bad_fraction`."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import get_worker_info

from ldm.errors import UserError

__all__ = ["EMPTY_CAPTION", "DataErrors"]

EMPTY_CAPTION = "its caption is empty; such images train the model without condition"

_PROCESSES = 128  # rows of counters, one for each worker, so that none overwrites the count of another
_NUM_NAMED, _TEXT_BYTES = 3, 240  # unreadable samples that a summary names, and the bytes kept of each message
_MIN_SAMPLES = 20  # before max_bad_fraction applies
_log = logging.getLogger(__name__)


class DataErrors:
    """Count unreadable, enlarged and empty samples of a data set, in memory that all workers of a loader share.

    Every unreadable sample is logged once; of enlarged images, and of empty captions and masks, only the first.
    `skip` raises UserError once more than `max_bad_fraction` of at least 20 samples were unreadable; None: no limit.
    """

    def __init__(self, num_files: int) -> None:
        self.max_bad_fraction: float | None = None
        self._unreadable = torch.zeros(num_files, dtype=torch.bool).share_memory_()
        self._empty = torch.zeros(num_files, dtype=torch.bool).share_memory_()
        self._enlarged = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._counts = torch.zeros(_PROCESSES, 2, dtype=torch.long).share_memory_()  # read, failed
        self._texts = torch.zeros(_NUM_NAMED, _TEXT_BYTES, dtype=torch.uint8).share_memory_()

    @property
    def num_unreadable(self) -> int:
        """Return the number of unreadable files so far, over all workers of this machine."""
        return int(self._unreadable.sum())

    @property
    def num_empty(self) -> int:
        """Return the number of files with an empty caption or mask so far, over all workers of this machine."""
        return int(self._empty.sum())

    def is_unreadable(self, file: int) -> bool:
        """Return whether a file was found unreadable before."""
        return bool(self._unreadable[file])

    def count_read(self) -> None:
        """Count one sample that was read."""
        self._counts[_process(), 0] += 1

    def skip(self, file: int, name: str, error: Exception) -> None:
        """Count an unreadable file. Raises UserError if there are too many."""
        problem = " ".join(str(error).split()) or repr(error)
        if not self._unreadable[file]:
            number = self.num_unreadable
            if number < _NUM_NAMED:
                text = f"{name}: {problem}".encode(errors="replace")[:_TEXT_BYTES]
                self._texts[number, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._unreadable[file] = True
            _log.warning("%s cannot be read and is skipped: %s", name, problem)
        self._counts[_process(), 1] += 1
        read, failed = self._counts.sum(0).tolist()
        total, limit = read + failed, self.max_bad_fraction
        if limit is not None and total >= _MIN_SAMPLES and failed > limit * total:
            raise UserError(
                f"data: {failed} of the first {total} samples cannot be read, more than max_bad_fraction={limit:g} "
                f"allows; first {'; '.join(self.first())}; repair or remove them, or raise data.params.max_bad_fraction"
            )

    def first(self) -> list[str]:
        """List the first unreadable files with their errors."""
        texts = [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace") for row in self._texts]
        return [text for text in texts if text]

    def summary(self) -> str:
        """Return the counts and the first names in one line."""
        read, failed = self._counts.sum(0).tolist()
        names = "; ".join(self.first())
        return f"{self.num_unreadable} unreadable so far ({failed} of {read + failed} times), first {names}"

    def note_empty(self, file: int, name: str, problem: str = EMPTY_CAPTION) -> None:
        """Count a file with an empty caption or mask."""
        if not self._empty[file]:
            if not self._empty.any():
                _log.warning("%s: %s", name, problem)
            self._empty[file] = True

    def note_enlarged(self, name: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
        """Log the first image that is smaller than wanted; both are (height, width)."""
        if not self._enlarged[0]:
            self._enlarged[0] = True
            have, want = "x".join(map(str, size)), "x".join(map(str, wanted))
            _log.warning("%s is %s, smaller than the size %s: such images are enlarged", name, have, want)


def _process() -> int:
    info = get_worker_info()
    return 0 if info is None else 1 + info.id % (_PROCESSES - 1)
