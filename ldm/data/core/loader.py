"""A loader that can resume inside an epoch, with the same batches for any number of workers."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ldm import distributed
from ldm.data.core.data_errors import DataErrors
from ldm.data.core.sampler import EpochSampler, ResumableSampler
from ldm.errors import UserError

__all__ = ["Loader", "collate"]

_log = logging.getLogger(__name__)


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch: tensors and numbers are stacked, floats as float32; texts, lists, dicts are listed; no items: {}.

    Raises UserError, naming the key, for items of different shapes or keys.
    """
    batch: dict[str, Any] = {}
    for key in items[0] if items else ():
        try:
            values = [item[key] for item in items]
            batch[key] = values if isinstance(values[0], (str, list, dict)) else _stacked(values)
        except KeyError:
            raise UserError(f"batch: not every item has the key {key!r}") from None
        except (RuntimeError, TypeError) as error:
            raise UserError(f"batch: items do not fit together under {key!r}: {error}") from error
    return batch


def _stacked(values: Sequence[Any]) -> Any:
    stacked = default_collate(values)
    is_float = isinstance(stacked, Tensor) and stacked.is_floating_point()
    return stacked.float() if is_float else stacked  # of whatever type the items of one's own data set are


class Loader(DataLoader):
    """Load batches of a data set or a stream in the order of a `ResumableSampler`.

    - Resumable: `state_dict` holds the epoch and the number of samples that all ranks have read of it.
    - Elastic: another loader resumes from that with any number of ranks and workers. Rank and world size are those of
      the moment at which the first batch is requested.
    - Streams of unknown length: Lightning prefetches one batch, so `state_dict` excludes the last batch returned.
    - `accumulate` batches make one step; an incomplete group at the end of an epoch of known length is dropped.
    - `errors`: the counts of unreadable samples are logged at the end of an iteration, if they grew.
    - `starting`: the workers are started within the context that this gives; none by default.

    Raises UserError for an evaluation on more ranks than there are samples, and for training data of less than one
    step.
    """

    def __init__(self, *args: Any, accumulate: int = 1, errors: DataErrors | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.starting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._started: set[BaseProcess] = set()
        self._accumulate = accumulate if self.drop_last else 1
        self._errors, self._num_logged = errors, 0
        self._returned = (0, 0)  # epoch and batches of the current iteration

    @property
    def position(self) -> tuple[int, int]:
        """Return (epoch, number of its batches that were returned or skipped)."""
        epoch, batches = self._start()
        return self._returned if self._returned[0] == epoch and self._returned[1] else (epoch, batches)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the loader is in it already."""
        if epoch != self.position[0]:
            self._seek(epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Return the position, for any number of ranks."""
        epoch, batches = self.position
        return {"epoch": epoch, "samples": batches * self.batch_size * distributed.world_size()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a position, rounded down to a whole batch."""
        self._seek(int(state["epoch"]), int(state["samples"]) // (self.batch_size * distributed.world_size()))

    @property
    def _is_resumable(self) -> bool:
        return isinstance(self.sampler, ResumableSampler)

    @property
    def _length_is_known(self) -> bool:
        return not self._is_resumable or self.sampler.length_is_known

    def _start(self) -> tuple[int, int]:
        return (self.sampler.epoch, self.sampler.start // self.batch_size) if self._is_resumable else (0, 0)

    def _seek(self, epoch: int, batches: int) -> None:
        self._returned = (epoch, 0)
        if self._is_resumable:
            self.sampler.epoch, self.sampler.start = epoch, batches * self.batch_size

    def __len__(self) -> int:
        if isinstance(self.sampler, EpochSampler):
            self._check_size(self.sampler.num_items, distributed.world_size())
        return self._count_batches()

    def _count_batches(self) -> int:
        return super().__len__() // self._accumulate * self._accumulate

    def _check_size(self, num_items: int, world: int) -> None:
        if self.sampler.evaluation and 0 < num_items < world:
            raise UserError(
                f"data: {num_items} items cannot be divided among {world} processes; evaluate on fewer, or give more"
            )
        if num_items > 0 and self._count_batches() == 0:
            several = f"{self._accumulate} batches" if self._accumulate > 1 else "one batch"
            raise UserError(
                f"data: {num_items} items do not fill {several} of {self.batch_size} on {world} processes; lower "
                "data.params.batch_size, or raise `repeats` of the data set"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.sampler, EpochSampler):
            len(self)  # raises if there is no batch at all
        elif self._is_resumable:
            self.sampler.check()
        ahead, is_empty = int(not self._length_is_known), True
        epoch, count = self._returned = self._start()
        limit = max(0, len(self) - count) if self._accumulate > 1 and self._length_is_known else None
        try:
            for batch in islice(self._loaded(), limit):
                count += 1
                self._returned = epoch, count - ahead
                if batch:
                    is_empty = False
                    yield batch
            self._returned = epoch, count
            if is_empty and self._is_resumable and (error := self.sampler.empty_error()) is not None:
                raise error
        except UserError as error:  # that of a worker has its traceback in the message
            raise UserError(re.split(r"\nldm\.errors\.\w+: ", error.whole.rstrip())[-1]) from None
        except RuntimeError as error:
            raise self._explained(error) from error.__cause__
        finally:
            self._log_unreadable()

    def _loaded(self) -> Iterator[dict[str, Any]]:
        others = set(active_children())
        with self.starting():
            batches = super().__iter__()
        self._started |= set(active_children()) - others
        return batches

    def _explained(self, error: RuntimeError) -> RuntimeError:
        """Name the signal that killed a worker in torch's own words, which lack it when it asked the worker first."""
        killed = [worker for worker in self._started if (worker.exitcode or 0) < 0]
        if not killed or "exited unexpectedly" not in str(error):
            return error
        numbers, names = ", ".join(str(worker.pid) for worker in killed), signal.strsignal(-(killed[0].exitcode or 0))
        return RuntimeError(f"DataLoader worker (pid(s) {numbers}) is killed by signal: {names}.")

    def _log_unreadable(self) -> None:
        if self._errors is not None and self._errors.num_unreadable > self._num_logged:
            self._num_logged = self._errors.num_unreadable
            _log.warning("data: %s", self._errors.summary())
