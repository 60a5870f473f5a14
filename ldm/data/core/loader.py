"""A loader that knows its place: deterministic over epochs, ranks and workers, and able to go on in mid-epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, default_collate

from ldm import distributed
from ldm.data.core.sampler import DrawSampler
from ldm.data.core.tally import Tally
from ldm.data.shards.streams import StreamSampler
from ldm.errors import UserError

__all__ = ["Loader", "collate"]

_log = logging.getLogger(__name__)


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put items together: tensors and numbers are stacked, texts, lists and dicts are listed; no items give {}.

    Raises UserError, naming the key, for items that do not fit together.
    """
    batch: dict[str, Any] = {}
    for key in items[0] if items else ():
        try:
            values = [item[key] for item in items]
            batch[key] = values if isinstance(values[0], (str, list, dict)) else default_collate(values)
        except KeyError:
            raise UserError(f"batch: not every item has the key {key!r}") from None
        except (RuntimeError, TypeError) as error:
            raise UserError(f"batch: items do not fit together under {key!r}: {error}") from error
    return batch


class Loader(DataLoader):
    """Load batches of a data set with a `DrawSampler`, or of a stream with a `StreamSampler`.

    An iteration starts when its first batch is asked for, with the epoch, rank and world of that moment, and gives the
    epoch that was set, as often as it is iterated. `state_dict` holds epoch and number of samples given by all ranks,
    from which another loader goes on, also with another number of processes or workers. Of a stream whose length is not
    known the last batch given does not count, since Lightning asks for one in advance. `accumulate` batches make a
    step: of an epoch of known length a rest that makes none is left out, as with one large batch. What `tally` counted
    unreadable is told when an iteration ends, if it grew. Raises UserError for evaluation on more ranks than there are
    samples.
    """

    def __init__(self, *args: Any, accumulate: int = 1, tally: Tally | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._accumulate = accumulate if self.drop_last else 1
        self._tally, self._told = tally, 0
        self._given = (0, 0)  # epoch and batches of the iteration under way

    @property
    def position(self) -> tuple[int, int]:
        """Give (epoch, batches of it that this loader has given or left out)."""
        epoch, batches = self._start()
        return self._given if self._given[0] == epoch and self._given[1] else (epoch, batches)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the loader is in it already."""
        if epoch != self.position[0]:
            self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Say where the loader is."""
        epoch, batches = self.position
        return {"epoch": epoch, "samples": batches * self.batch_size * distributed.world_size()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where a loader was, rounded down to a batch."""
        self._go_to(state["epoch"], state["samples"] // (self.batch_size * distributed.world_size()))

    @property
    def _has_place(self) -> bool:
        return isinstance(self.sampler, (DrawSampler, StreamSampler))

    @property
    def _length_is_known(self) -> bool:
        return not isinstance(self.sampler, StreamSampler) or self.sampler.is_endless

    def _start(self) -> tuple[int, int]:
        return (self.sampler.epoch, self.sampler.start // self.batch_size) if self._has_place else (0, 0)

    def _go_to(self, epoch: int, batches: int) -> None:
        self._given = (epoch, 0)
        if self._has_place:
            self.sampler.epoch, self.sampler.start = epoch, batches * self.batch_size

    def __len__(self) -> int:
        if isinstance(self.sampler, DrawSampler):
            self._check_size(self.sampler.num_items, distributed.world_size())
        return self._count_batches()

    def _count_batches(self) -> int:
        return super().__len__() // self._accumulate * self._accumulate

    def _check_size(self, num_items: int, world: int) -> None:
        if self.sampler.evaluation and 0 < num_items < world:
            raise UserError(
                f"data: {num_items} items cannot be shared out among {world} processes; evaluate on fewer, or give more"
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
        if isinstance(self.sampler, DrawSampler):
            len(self)  # says so if there is no batch at all
        elif isinstance(self.sampler, StreamSampler):
            self.sampler.check()
        ahead, is_empty = int(not self._length_is_known), True
        epoch, given = self._given = self._start()
        limit = max(0, len(self) - given) if self._accumulate > 1 and self._length_is_known else None
        try:
            for batch in islice(super().__iter__(), limit):
                given += 1
                self._given = epoch, given - ahead
                if batch:
                    is_empty = False
                    yield batch
            self._given = epoch, given
            if is_empty and isinstance(self.sampler, StreamSampler) and self.sampler.evaluation:
                raise self.sampler.stream.nothing_readable()
        except UserError as error:  # a worker's comes with its traceback in the message
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
        finally:
            self._tell_unreadable()

    def _tell_unreadable(self) -> None:
        if self._tally is not None and self._tally.num_unreadable > self._told:
            self._told = self._tally.num_unreadable
            _log.warning("data: %s", self._tally.summary())
