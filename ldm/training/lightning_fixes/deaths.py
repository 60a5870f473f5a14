"""Say in one line which process of a training died: a loader worker, or one of the ranks; and why, if that is known.

Works around Lightning 2.6, which kills the process that started the others, without a word, when one of them has died.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from pytorch_lightning.strategies.launchers import subprocess_script

from ldm.distributed import is_first_process

_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)"
)
_GLOO = "gloo/transport"  # stands in what gloo says of a lost connection, which has no type of its own
_GRACE_SECONDS = 10  # for the first rank to notice by itself, which it does unless its device hangs
_REAPING_SECONDS = 2
_SHARED_MEMORY = "; /dev/shm is full: give it more room, or data.params.num_workers=0"


class Deaths:
    """Explain errors that come of the death of another process, from the moment at which this is made.

    A training of several `processes` also ends if a rank died that Lightning started here and nobody noticed; `advice`
    then says how to go on.
    """

    def __init__(self, processes: int, advice: Callable[[], str]) -> None:
        self._processes, self._advice = processes, advice
        self._ranks: Sequence[subprocess.Popen[bytes]] = ()
        self._parent, self._kills = os.getppid(), _kills_for_memory()
        subprocess_script._launch_process_observer = self._watch

    def _watch(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        threading.Thread(target=self._observe, daemon=True).start()

    def _observe(self) -> None:
        while not (dead := self._dead_ranks()):
            if all(rank.poll() == 0 for rank in self._ranks):
                return
            time.sleep(1)
        time.sleep(_GRACE_SECONDS)
        sys.stderr.write(f"error: {dead}; {self._advice()}\n")
        for rank in self._ranks:
            rank.kill()
        os._exit(1)

    def explain(self, error: BaseException | None) -> str | None:
        """Return which process died, "" if another rank says it, and None if that is not where an error comes from."""
        while error is not None:
            if found := _WORKER.search(str(error)):
                return self._worker(found[1], found[2] or "")
            if self._processes > 1 and (isinstance(error, dist.DistError) or _GLOO in str(error)):
                return self._rank()
            error = error.__cause__ or error.__context__
        return None

    def _worker(self, numbers: str, how: str) -> str:
        why = f" ({how})" if how else ""
        if how.startswith("Bus error"):
            why += _SHARED_MEMORY
        return f"loader worker {numbers} died{why}{self._memory(killed=how in ('', 'Killed'))}"

    def _rank(self) -> str:
        """Return which rank died, as far as this process knows: the first knows those that it started, they know it."""
        end = time.monotonic() + _REAPING_SECONDS
        while not (dead := self._dead_ranks()) and time.monotonic() < end:
            if os.getppid() != self._parent:
                is_next = os.environ.get("LOCAL_RANK") == "1"
                return f"rank 0 (process {self._parent}) died{self._memory()}" if is_next else ""
            time.sleep(0.1)
        if dead or not is_first_process():
            return dead
        return "the connection to another rank was lost; what ended it stands in the output of that rank"

    def _dead_ranks(self) -> str:
        dead = [(number, rank) for number, rank in enumerate(self._ranks, start=1) if rank.poll()]
        # Those that end because another one did exit by themselves.
        number, rank = min(dead, key=lambda entry: entry[1].returncode, default=(0, None))
        if rank is None:
            return ""
        if rank.returncode > 0:
            return f"rank {number} (process {rank.pid}) ended with status {rank.returncode}"
        name = signal.Signals(-rank.returncode).name
        return f"rank {number} (process {rank.pid}) was killed by {name}{self._memory(name == 'SIGKILL')}"

    def _memory(self, killed: bool = True) -> str:
        is_known = killed and _kills_for_memory() > self._kills
        return ", for lack of memory: choose a smaller batch or fewer workers" if is_known else ""


def _kills_for_memory() -> int:
    """Return how many processes the kernel has killed for lack of memory since it started; 0 where it does not say."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counts.get("oom_kill", 0))
