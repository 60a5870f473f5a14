"""Samples on demand: one worker draws what is asked for in turn; a job can be watched and cancelled."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from ldm.data.core.pixels import to_bytes
from ldm.diffusion.grids import grid_names
from ldm.errors import UserError, lack_of_memory
from ldm.images import ImageWriter
from ldm.models.generate import generate, with_strength
from ldm.models.image_request import joined
from ldm.models.loading import LoadedModel, ModelSource, load_first_stage, load_model
from ldm.models.tiled import tile
from ldm.sampling import sampler_names
from ldm.serve.items import RunData, png_of
from ldm.serve.orders import LIMITS, Order, options_of
from ldm.serve.tasks import Task, check_taken, task_of
from ldm.serve.uploads import Upload

_log = logging.getLogger(__name__)
_MODELS_KEPT, _JOBS_KEPT, _AT_A_TIME = 3, 64, 4
_ENDED = ("done", "failed", "cancelled")


@dataclass
class Job:
    """An order on its way: waiting, loading, drawing, done, failed or cancelled."""

    number: int
    run: Path
    order: Order
    state: str = "waiting"
    done: int = 0
    total: int = 0
    problem: str = ""
    source: bytes | None = None  # PNG of what the images are drawn from
    images: list[bytes] = field(default_factory=list)  # PNG
    cancelled: threading.Event = field(default_factory=threading.Event)

    def public(self) -> dict[str, Any]:
        """Return what the page is told of it."""
        names = ("number", "state", "done", "total", "problem")
        own = {name: getattr(self, name) for name in names}
        return {**own, "run": self.run.name, "source": self.source is not None, "images": len(self.images)}


class _Cancelled(Exception):
    pass


class Studio:
    """Loads models when they are first asked for, keeps the last few, and works off the orders one by one.

    outdir: Folder below which the images are kept that were drawn, each run's in one of its name, with a record of
    every order; None to keep them in memory alone.
    """

    def __init__(self, device: torch.device, outdir: Path | None = None) -> None:
        self.device, self.outdir, self.data = device, outdir, RunData()
        self._models: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._queue: Queue[Job | None] = Queue()
        self._numbers = itertools.count(10**7 + secrets.randbelow(10**8))  # not those of a server before this one
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._worker = threading.Thread(target=self._work, name="studio", daemon=True)
        self._worker.start()

    # --- jobs ------------------------------------------------------------------------------------------------------

    def submit(self, run: Path, order: Order) -> Job:
        """Queue an order. UserError if too many wait already."""
        with self._lock:
            if self._queue.qsize() >= LIMITS["waiting"]:
                raise UserError(f"{LIMITS['waiting']} orders are waiting already; try again when some are done")
            job = Job(next(self._numbers), run, order)
            self._jobs[job.number] = job
            while len(self._jobs) > _JOBS_KEPT + LIMITS["waiting"]:
                self._jobs.popitem(last=False)
        self._queue.put(job)
        return job

    def job(self, number: int) -> Job:
        """Return a job. UserError for one that there is not, or not any more."""
        with self._lock:
            if number not in self._jobs:
                raise UserError(f"job {number}: there is none, or it was a while ago")
            return self._jobs[number]

    def public(self, number: int) -> dict[str, Any]:
        """Return what the page is told of a job, and how many are drawn before it. UserError as `job` has it."""
        job = self.job(number)
        with self._lock:
            before = [other for other in self._jobs.values() if other.number < number and other.state not in _ENDED]
        return {**job.public(), "before": len(before)}

    def cancel(self, number: int) -> Job:
        """Let a job end at its next step; one that waits ends at once."""
        job = self.job(number)
        job.cancelled.set()
        if job.state == "waiting":
            job.state = "cancelled"
        return job

    def stop(self) -> None:
        """End the worker after its present step."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancelled.set()
        self._queue.put(None)
        self._worker.join(timeout=30)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._run(job)
            except _Cancelled:
                job.state = "cancelled"
            except UserError as error:
                job.state, job.problem = "failed", str(error)
            except Exception as error:  # the page goes on; the log has the trace
                _log.exception("serve: job %d failed", job.number)
                job.state = "failed"
                job.problem = lack_of_memory(error) or f"{type(error).__name__}; the server's log says more"

    def _run(self, job: Job) -> None:
        _raise_if_cancelled(job)
        job.state, order = "loading", job.order
        loaded = self.loaded(job.run, order.weights)
        model, task, sampler = loaded.model, self._task(job.run, loaded), order.how_sampled()
        check_taken(task, order)
        request = task.request(order, _size(loaded, order))
        if request.image is not None:
            sampler = with_strength(sampler, order.strength, model.process)
        if order.tile:
            model = tile(model, loaded.trained_tile())
        job.source = None if request.source is None else png_of(request.source)
        parts = [range(first, min(first + _AT_A_TIME, order.count)) for first in range(0, order.count, _AT_A_TIME)]
        job.total, job.state = len(parts) * (len(sampler.times(model.process)) - 1), "drawing"

        def on_step(step: object) -> None:
            _raise_if_cancelled(job)
            job.done = min(job.done + 1, job.total)

        drawn: list[Tensor] = []
        try:
            for part in parts:
                batch = joined([request] * len(part), order.seed + part[0], order.how_guided())
                for images in generate(model, sampler, batch, on_step):
                    drawn += map(request.finish, to_bytes(images).cpu())
                    job.images = [*job.images, *map(png_of, drawn[len(job.images) :])]
        finally:
            self._keep(job, loaded, drawn)
        job.state = "done"

    def _keep(self, job: Job, loaded: LoadedModel, drawn: Sequence[Tensor]) -> None:
        """Write the images that were drawn, also of a job that was cancelled, and a record of the order."""
        if self.outdir is None or not drawn:
            return
        folder = ImageWriter(self.outdir / job.run.name)
        for number, image in enumerate(drawn):
            folder.add(image, {"seed": job.order.seed + number})
        asked = {one.name: getattr(job.order, one.name) for one in fields(Order)}
        asked |= {name: {"sha256": sha256(x).hexdigest()} for name, x in asked.items() if isinstance(x, Upload)}
        of_model = {name: str(getattr(loaded, name)) for name in ("config", "checkpoint", "weights")}
        folder.finish({**of_model, "order": asked})

    # --- models ----------------------------------------------------------------------------------------------------

    def loaded(self, run: Path, weights: str = "ema") -> LoadedModel:
        """Return the model of a run with the weights that its file has now. UserError as `load_model` has it."""
        return self._cached(load_model, ModelSource(run, weights=weights))

    @torch.no_grad()
    def decoded(self, run: Path, image: Tensor) -> Tensor:
        """Return what is left of an image (C, H, W) in [-1, 1] after the first stage. UserError for a run without."""
        autoencoder = self._cached(load_first_stage, ModelSource(run)).autoencoder
        return autoencoder.decode(autoencoder.encode_mode(image[None].to(self.device)))[0]

    def _cached(self, load: Callable[[ModelSource, torch.device], Any], source: ModelSource) -> Any:
        with self._loading:  # one at a time: two visitors of a run do not load it twice
            key = load, source, source.files()[1].stat().st_mtime_ns
            if key not in self._models:
                self._models[key] = load(source, self.device)
                while len(self._models) > _MODELS_KEPT:
                    self._models.popitem(last=False)
            self._models.move_to_end(key)
            return self._models[key]

    def controls(self, run: Path) -> dict[str, Any]:
        """Return what can be chosen for a model: its task, weights, samplers and grids."""
        loaded = self.loaded(run)
        task = self._task(run, loaded)
        return {
            "task": task.name,
            "takes": list(task.takes),
            "size": loaded.model.image_size,
            "guided": loaded.model.cond_stage_model is not None,
            "tiles": task.has_tiles,
            "weights": loaded.averages,
            "samplers": {name: options_of(name) for name in sampler_names()},
            "grids": grid_names(),
            "limits": LIMITS,
            **task.controls(),
        }

    def _task(self, run: Path, loaded: LoadedModel) -> Task:
        return task_of(loaded, partial(self.data.item, run))


def _size(loaded: LoadedModel, order: Order) -> tuple[int, int]:
    """Return (height, width) as asked for, by default as in training. UserError for what the model cannot draw."""
    trained, multiple = loaded.model.image_size or (None, None), loaded.model.side_multiple
    size = order.height or trained[0], order.width or trained[1]
    if None in size:
        raise UserError(f"height, width: {loaded.config} does not say the size of the images; give both")
    if any(side % multiple for side in size):
        raise UserError(f"height, width: {size[0]} x {size[1]}; this model draws sides that {multiple} divides")
    return size


def _raise_if_cancelled(job: Job) -> None:
    if job.cancelled.is_set():
        raise _Cancelled
