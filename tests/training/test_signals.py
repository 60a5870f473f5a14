"""Loader workers and signals: what asks a run to stop never ends a worker, and what killed one is said."""

import os
import signal
from collections.abc import Callable

import pytest
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from ldm.data.core.loader import Loader, collate
from ldm.training.lightning_fixes.signals import leave_signals_to_us

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class Numbers(Dataset):
    """Four numbers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"number": index}


class Endings(Numbers):
    """Ends the worker that is asked for the last number as a kernel that lacks memory does."""

    def __getitem__(self, index: int) -> dict[str, int]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    return lambda: (first(), second())[0]


@pytest.mark.parametrize("name", ASKING)
def test_a_signal_that_comes_before_a_worker_ignores_it_does_not_end_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch gives a worker its own handlers first; whatever comes right then waits, and is ignored."""
    ours = signal.signal(signal.Signals[name], signal.SIG_DFL)
    try:
        asked = then(signal_handling._set_worker_signal_handlers, lambda: os.kill(os.getpid(), signal.Signals[name]))
        monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", asked)
        loader = leave_signals_to_us(Loader(Numbers(), batch_size=2, num_workers=2, collate_fn=collate))
        assert [batch["number"].tolist() for batch in loader] == [[0, 1], [2, 3]]
    finally:
        signal.signal(signal.Signals[name], ours)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.Signals[name] for name in ASKING}


def test_the_signal_that_killed_a_worker_is_named_also_where_its_state_was_asked_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch names it only if SIGCHLD is handled before it sees that the worker lives no more."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", True)  # then nothing handles SIGCHLD
    handled = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        loader = Loader(Endings(), batch_size=2, num_workers=1, collate_fn=collate)
        with pytest.raises(RuntimeError, match=r"worker \(pid\(s\) \d+\) is killed by signal: Killed"):
            list(loader)
    finally:
        signal.signal(signal.SIGCHLD, handled)
