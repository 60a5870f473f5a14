"""What a run is asked from outside, by signals: SIGTERM, SIGUSR1 and Ctrl-C mean save and stop.

A handler only notes the request. Several ranks agree on it by an exchange of one number a step over a CPU group, that
is sent off at one step and read at the next: no rank waits for a device, nor for another rank beyond the step that it
shares its gradients with anyway.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class GracefulStop:
    """Listen to signals between `listen` and `release`, and tell all ranks at the same step that one was asked."""

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
        """Return the signals back."""
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
