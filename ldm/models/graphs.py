"""The calls of a backbone, recorded once for each shape of its inputs and then replayed: CUDA graphs.

At batch 1 the kernels of a U-Net are launched more slowly than they run; a graph launches all of them at once. It reads
and writes fixed addresses, so inputs are copied in and the output is copied out. Shapes, dtypes, layouts and autocast
decide which recording is used; weights that moved in memory make all of them stale, new values in place do not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import shown
from ldm.networks.layers import is_watched

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

Run = Callable[[], Tensor]
Record = Callable[[Run], tuple[Callable[[], object], Tensor]]  # -> what runs it again; the output that is overwritten
MakeRecorder = Callable[[torch.device], Record]
Inputs = Sequence[Tensor | None]
_KEPT = 8  # recordings of a backbone; beyond, all make room
_log = logging.getLogger(__name__)


class CudaRecorder:
    """Record on a device of CUDA. All recordings share their memory, which holds nothing of value between replays."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, run: Run) -> tuple[Callable[[], object], Tensor]:
        """Run to warm up, on a stream of its own as capture asks for, and record. RuntimeError if it cannot be.

        What waits for the device is found before the capture: before torch 2.13 one that fails leaves behind a random
        generator and an allocator that are out of use.
        """
        caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # which a capture that fails may leave as the current one
            self._stream.wait_stream(caller)
            run()
            with _waiting_refused():
                run()
            # What other threads do meanwhile, such as pinning memory for a loader, does not spoil the recording.
            capture = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **capture):
                output = run()
        caller.wait_stream(self._stream)
        return graph.replay, output


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Let what waits for the device raise RuntimeError inside a block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Recording(NamedTuple):
    """A recorded call: where it reads its inputs, what runs it again, and where it leaves its output."""

    places: Inputs
    replay: Callable[[], object]
    output: Tensor

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the output for inputs of the recorded shapes, which the next call does not overwrite."""
        for place, value in zip(self.places, inputs, strict=True):
            if place is not None:
                place.copy_(value)
        self.replay()
        return self.output.clone()


class Graphs:
    """The recordings of one backbone, at most `limit`; copies of a model begin without any.

    `recorder` makes what records; by default CUDA's, and on other devices nothing is recorded. A shape is recorded when
    it comes for the second time, so that what is called once costs nothing. The first failure, such as too little
    memory or an operation that waits for the device, is told in one line, and is the end of recording. Where one too
    many is recorded, all go: to free one alone frees a workspace of cuBLAS that the others use (torch before 2.15).
    """

    def __init__(self, recorder: MakeRecorder | None = None, limit: int = _KEPT) -> None:
        self._recorder, self._limit = recorder, limit
        self._lock, self._has_failed = Lock(), False
        self.clear()

    def __reduce__(self) -> tuple[type[Graphs], tuple[Any, ...]]:
        return Graphs, (self._recorder, self._limit)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget the recordings, which frees their memory."""
        self._kept: dict[tuple[Any, ...], Recording] = {}
        self._seen: deque[tuple[Any, ...]] = deque(maxlen=self._limit)  # what came once
        self._record: Record | None = None
        self._weights: list[int] = []

    def around(self, backbone: nn.Module) -> Callable[..., Tensor]:
        """Return what is called like the backbone and replays its recordings, until its weights move.

        It is the backbone itself where nothing can be recorded.
        """
        tensors = list(chain(backbone.parameters(), backbone.buffers()))
        device = tensors[0].device if tensors else torch.device("cpu")
        if self._has_failed or (self._recorder is None and device.type != "cuda"):
            return backbone
        weights = [tensor.data_ptr() for tensor in tensors]
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return partial(self._call, backbone)

    def _call(
        self, backbone: nn.Module, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        inputs = (x, t, context, y)
        with self._lock:
            if (recording := self._recording(backbone, inputs)) is not None:
                return recording(inputs)
        return backbone(x, t, context=context, y=y)

    def _recording(self, backbone: nn.Module, inputs: Inputs) -> Recording | None:
        """Return the recording for such inputs, made now if they come for the second time; None before."""
        if self._has_failed:
            return None
        key = (backbone.training, *_autocast(inputs[0]).values(), *map(_form, inputs))
        if key in self._kept:
            return self._kept[key]
        if key not in self._seen:
            self._seen.append(key)
            return None
        self._seen.remove(key)
        if len(self._kept) == self._limit or self._record is None:
            self._kept.clear()
            self._record = (self._recorder or CudaRecorder)(inputs[0].device)
        if (recording := self._recorded(backbone, inputs)) is not None:
            self._kept[key] = recording
        return recording

    @torch.no_grad()
    def _recorded(self, backbone: nn.Module, inputs: Inputs) -> Recording | None:
        autocast = _autocast(inputs[0])

        def run() -> Tensor:
            # Without the cache, which hands out casts of weights that lie outside of the recording and are freed.
            with torch.autocast(**autocast, cache_enabled=False):
                return backbone(x, t, context=context, y=y)

        try:
            with torch.inference_mode(False), torch.cuda.device_of(inputs[0]):
                x, t, context, y = places = [None if value is None else value.clone() for value in inputs]
                return Recording(places, *self._record(run))
        except RuntimeError as error:
            self._has_failed = True
            self._kept.clear()
            _log.warning("sampling: no CUDA graphs (%s); kernels are launched one by one", shown(_first(error), 150))
            return None


def _first(error: BaseException) -> str:
    """Return what went wrong first; the end of a capture that has failed is an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error)


def graphed(model: LatentDiffusion) -> nn.Module:
    """Return the network of a model with a backbone that is recorded and replayed where its device can do so.

    It is the network itself where hooks watch its layers: they run at calls, not in replays.
    """
    if any(map(is_watched, model.model.modules())):
        return model.model
    return model.model.wrapped(model.graphs.around)


def _autocast(x: Tensor) -> dict[str, Any]:
    """Return the present arguments of autocast."""
    kind = x.device.type
    enabled = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": enabled}


def _form(value: Tensor | None) -> Any:
    """Return what must be equal for a recording to serve for another input."""
    return None if value is None else (value.shape, value.stride(), value.dtype, value.device)
