"""Stop when asked by a signal: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C. What trains saves at its next step first.

Works around Lightning 2.6, which raises in the middle of a step on SIGTERM, saves nothing, and does not let ranks agree
on a step. Here a handler only notes the request. Ranks agree by an all-reduce of one number a step over a CPU group,
started at one step and read at the next, so that no rank waits for a device.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.utilities.seed import pl_worker_init_function

from ldm.data.core.loader import Loader
from ldm.distributed import is_first_process

Handler = Callable[[int, FrameType | None], None]
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has two of them
_ASKING = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)


class Stopped(BaseException):
    """A run was asked to stop. No error, so that nothing that handles errors holds it up."""


class Interrupted(BaseException):
    """A run was told to stop at once, by Ctrl-C. No KeyboardInterrupt, which Lightning takes for its own."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a signal end a block at once, where nothing is to be saved; `GracefulStop` may take over for a while."""
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # not in a loader worker that has just been forked
            raise Interrupted("interrupted") if number == signal.SIGINT else Stopped("asked to stop")

    previous = _take_over(end)
    try:
        yield
    finally:
        _give_back(previous)


def leave_signals_to_us(loader: Loader) -> Loader:
    """Let the workers of a loader ignore what asks a run to stop: who signals a group would kill them before the save.

    They end with the process that they work for.
    """
    if loader.worker_init_fn is None:
        loader.worker_init_fn, loader.starting = _begin_worker, _held_back
    return loader


@contextmanager
def _held_back() -> Iterator[None]:
    """Let signals wait. A process that is started meanwhile inherits that: none reaches it before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no groups to signal either
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _begin_worker(worker_id: int) -> None:
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
    pl_worker_init_function(worker_id)  # Lightning's seeds, which it gives to loaders without such a function


def _take_over(handler: Handler) -> dict[int, Any]:
    """Handle what asks to stop, unless nohup forbids it, in place of a cluster's handler too; return those before."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        return {}
    ignored = {number for number in _ASKING if signal.getsignal(number) == signal.SIG_IGN and number.name == "SIGHUP"}
    return {number: signal.signal(number, handler) for number in _ASKING if number not in ignored}


def _give_back(previous: dict[int, Any]) -> None:
    while previous:
        number, handler = previous.popitem()
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class GracefulStop:
    """Note signals between `listen` and `release`; all ranks learn of one at the same step."""

    def __init__(self) -> None:
        self.is_pending = False
        self._previous: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None

    def listen(self, world_size: int) -> None:
        """Take the signals over: what starts the job again is its script."""
        if world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._previous = _take_over(self._note)

    def release(self) -> None:
        """Restore the previous handlers."""
        _give_back(self._previous)
        self._exchange = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_pending = True
        if number == signal.SIGINT:
            signal.signal(number, _interrupt)
            if is_first_process():
                _say("stopping at the next step; Ctrl-C again stops at once, without a save")

    def agreed(self) -> bool:
        """Return whether to stop now; called by all ranks once a step."""
        if self._group is None:
            return self.is_pending
        asked = False
        if self._exchange is not None:
            work, flag = self._exchange
            work.wait()
            asked = bool(flag)
        flag = torch.tensor(float(self.is_pending))
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = work, flag
        return asked


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted("interrupted without a save")


def _say(line: str) -> None:
    """Write to stderr from a handler, which may have interrupted another write to it."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:  # a terminal that is gone
        return
