"""Save and stop when asked by a signal: SIGTERM, SIGUSR1 or Ctrl-C.

Works around Lightning 2.6, which raises in the middle of a step on SIGTERM, saves nothing, and does not let ranks agree
on a step. Here a handler only notes the request. Ranks agree by an all-reduce of one number a step over a CPU group,
started at one step and read at the next, so that no rank waits for a device.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class GracefulStop:
    """Note signals between `listen` and `release`; all ranks learn of one at the same step."""

    def __init__(self) -> None:
        self.is_pending = False
        self._previous: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None

    def listen(self, world_size: int) -> None:
        """Take the signals over, also from a cluster's own handler: what starts the job again is its script."""
        if world_size > 1:
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():  # only there may signals be handled
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if name in signal.Signals.__members__:  # Windows has no SIGUSR1
                    number = signal.Signals[name]
                    self._previous[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Restore the previous handlers."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._exchange = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_pending = True
        if number == signal.SIGINT:  # a second Ctrl-C ends the run at once
            signal.signal(number, signal.default_int_handler)

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
