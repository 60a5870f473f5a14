"""A loader that knows its place: deterministic over epochs, ranks and workers, and able to go on in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate

from ldm.data.sampler import DrawSampler, rank_and_world
from ldm.data.shards import Shards
from ldm.errors import UserError

__all__ = ["Loader", "collate"]


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put items together: tensors and numbers are stacked, texts, lists and dicts are listed.

    Raises UserError, naming the key, for items that do not fit together.
    """
    batch: dict[str, Any] = {}
    for key in items[0]:
        try:
            values = [item[key] for item in items]
            batch[key] = values if isinstance(values[0], (str, list, dict)) else default_collate(values)
        except KeyError:
            raise UserError(f"batch: not every item has the key {key!r}") from None
        except (RuntimeError, TypeError) as error:
            raise UserError(f"batch: items do not fit together under {key!r}: {error}") from error
    return batch


class Loader(DataLoader):
    """Load batches of a `Shards` stream, or of a data set with a `DrawSampler`.

    An iteration starts when its first batch is asked for, with the epoch, rank and world of that moment. A loader over
    a sampler gives the epoch that was set, as often as it is iterated; a training stream goes on to its next epoch by
    itself. `state_dict` holds epoch and number of samples given by all ranks, from which another loader goes on, also
    with another number of processes; a stream needs as many workers as before for that. Of a stream whose length is not
    known the last batch given does not count, since Lightning asks for one in advance.
    """

    _given = (0, 0)  # epoch and batches of the iteration under way

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
        return {"epoch": epoch, "samples": batches * self.batch_size * rank_and_world()[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where a loader was, rounded down to a batch."""
        self._go_to(state["epoch"], state["samples"] // (self.batch_size * rank_and_world()[1]))

    def _start(self) -> tuple[int, int]:
        if isinstance(self.sampler, DrawSampler):
            return self.sampler.epoch, self.sampler.start // self.batch_size
        return self.dataset.position if isinstance(self.dataset, Shards) else (0, 0)

    def _go_to(self, epoch: int, batches: int) -> None:
        self._given = (epoch, 0)
        if isinstance(self.sampler, DrawSampler):
            self.sampler.epoch, self.sampler.start = epoch, batches * self.batch_size
        elif isinstance(self.dataset, Shards):
            self.dataset.set_position(epoch, batches)

    def __len__(self) -> int:
        if isinstance(self.dataset, Shards):
            return self.dataset.num_batches(rank_and_world()[1])
        num_batches = super().__len__()
        if num_batches == 0 and not isinstance(self.dataset, IterableDataset) and len(self.dataset) > 0:
            raise UserError(
                f"data: {len(self.dataset)} items do not fill one batch of {self.batch_size} on {rank_and_world()[1]} "
                "processes; lower data.params.batch_size, or raise `repeats` of the data set"
            )
        return num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        limit, ahead = None, 0
        if isinstance(self.dataset, Shards):
            limit = self._begin_stream()
            ahead = int(limit is None)
        elif not isinstance(self.dataset, IterableDataset):
            len(self)  # says so if there is no batch at all
        epoch, given = self._given = self._start()
        try:
            for batch in islice(super().__iter__(), limit):
                given += 1
                self._given = epoch, given - ahead
                yield batch
            self._given = epoch, given
        except UserError as error:  # a worker's comes with its traceback in the message
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None

    def _begin_stream(self) -> int | None:
        """Move to the next epoch if this one was begun; return how many batches are to come, None if until the end."""
        epoch, batches = self._start()
        if self.dataset.plan.shuffle and self._given[0] == epoch and self._given[1] > 0:
            epoch, batches = epoch + 1, 0
            self._go_to(epoch, batches)
        self.dataset.join(*rank_and_world())
        if self.dataset.samples_per_epoch is None or not self.dataset.plan.shuffle:
            return None
        return max(0, len(self) - batches)
