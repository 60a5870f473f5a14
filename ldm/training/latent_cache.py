"""Encode the training set once, into files that outlive the run, where `lightning.cache_latents` asks for it.

Kept are the moments of the first stage and what frozen conditioners make; every rank writes its part of the files. A
training from them is that from images: view e of an item is its crop of epoch e, and noise is drawn anew every time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ldm.autoencoder.regularizers import DiagonalGaussian
from ldm.conditioning.base import EMBEDDED, Conditioner
from ldm.config.nodes import is_node, without_checkpoints
from ldm.config.parameters import parameters_of
from ldm.config.targets import find_target
from ldm.data.core.buckets import Bucketed
from ldm.data.core.files import find_files
from ldm.data.core.latents import CachedLatents, CacheSettings, LatentFiles, read_null
from ldm.data.core.module import DataModule, contents_of
from ldm.errors import ConfigError, UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.training.devices import autocast
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.lightning_fixes.signals import leave_signals_to_us
from ldm.training.module import TrainingModule
from ldm.training.plan import Plan
from ldm.weights import load as checkpoint
from ldm.writing import write_text

_log = logging.getLogger(__name__)
_PATH, _FORMAT = "lightning.cache_latents", 2
_FROZEN = ("first_stage_model.", "cond_stage_model.")
Identity = dict[str, Any]


class LatentCache(pl.Callback):
    """The cache of a training set: made before the first step as far as it is missing, then read instead of images.

    UserError for what cannot be cached, and for a folder that holds another cache or a damaged file.
    """

    def __init__(self, plan: Plan, training: TrainingModule, data: DataModule, settings: CacheSettings) -> None:
        if not isinstance(training, DiffusionTraining):
            raise ConfigError("only a latent diffusion model has a frozen encoder", _PATH)
        if training.alignment is not None:
            raise ConfigError("an alignment needs the images, which a cache leaves out; set one of them to null", _PATH)
        if isinstance(data.train, IterableDataset):
            raise UserError(f"{_PATH}: a stream has no positions to be kept under; leave it out")
        if isinstance(data.train, Bucketed):
            raise UserError(f"{_PATH}: images in shapes of their own fill no files of equal rows; leave it out")
        self.model, self.data, self.settings = training.model, data, settings
        self.precision = str(plan.lightning["trainer"].get("precision", 32))
        self.conditioners = _frozen_conditioners(self.model)
        if not plan.run.is_new:  # the weights that the run once started from need not be there any more
            state = checkpoint.read(plan.run.checkpoint)
            frozen = {name: value for name, value in state.items() if name.startswith(_FROZEN)}
            training.load_state_dict(frozen, strict=False)
        self.identity = self._identity(plan)
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        beside = plan.run.path.parent.parent / "outputs" / "latents" / key
        folder = Path(settings.folder).expanduser() if settings.folder else beside
        self.files = LatentFiles(folder, key, len(data.train), settings.views, settings.rows)
        self._check_index()
        self.files.missing()

    @property
    def cached_data(self) -> DataModule:
        """Return the data with the cache in the place of the training set."""
        data = self.data
        options = {"num_workers": 0, "shuffle": data.shuffle, "drop_last": data.drop_last, "seed": data.seed}
        return DataModule(data.batch_size, CachedLatents(self.files), data.validation, data.test, **options)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Encode what is missing, each rank its part, before a training begins."""
        if stage == "fit":
            self.encode(trainer.strategy.root_device, trainer.global_rank, trainer.world_size)
            trainer.strategy.barrier()
            self.finish(trainer.is_global_zero)

    # --- encoding --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Write the missing ones of the files rank, rank + world, ..., and on rank 0 what describes the cache."""
        missing = set(self.files.missing())
        mine = [number for number in range(rank, len(self.files), world) if number in missing]
        if rank == 0:
            self._begin(len(missing), device)
        if not mine:
            return
        size, seed = self.data.batch_size, self.data.seed
        rows = [self.files.rows_of(number) for number in mine]
        chunks = [part[start : start + size] for part in rows for start in range(0, len(part), size)]
        samples = [[self.files.sample(row, seed) for row in chunk] for chunk in chunks]
        batches = iter(leave_signals_to_us(self.data.encoding_loader(samples)))
        for number, part in zip(mine, rows, strict=True):
            encoded = [self._encoded(batch, device) for batch in islice(batches, -(-len(part) // size))]
            sums = sum(self._sums(batch["moments"]) for batch in encoded)
            self.files.write(number, encoded, sums.tolist())

    def _begin(self, missing: int, device: torch.device) -> None:
        files = self.files
        if missing:
            said = "encoding %d images, %d views of each: %d of %d files in %s"
            _log.info(said, files.items, files.views, missing, len(files), files.folder)
        if not files.index.exists():
            try:
                files.folder.mkdir(parents=True, exist_ok=True)
                write_text(files.index, json.dumps(self.identity, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"{files.folder}: cannot be written ({error.strerror}); set {_PATH}.folder") from error
        if self.conditioners and not files.null.exists():
            first = [files.sample(row, self.data.seed) for row in range(min(files.items, self.data.batch_size))]
            batch = self._on(device, next(iter(self.data.encoding_loader([first]))))
            drop = torch.ones(self.data.batch_size, dtype=torch.bool)
            with autocast(self.precision, device.type):
                parts = self.conditioners.items()
                nulls = {name: part.to(device).embed_dropped(part.value(batch), drop)[0] for name, part in parts}
            files.save(files.null, {name: null.contiguous().cpu() for name, null in nulls.items()})

    def finish(self, is_first: bool = True) -> None:
        """Let the model use the cache; `is_first` writes statistics of its latents. UserError if it is not whole."""
        if missing := self.files.missing():
            raise UserError(f"{self.files.path(missing[0])}: is missing; start the encoding again")
        for name, null in read_null(self.files).items():
            self.conditioners[name].use_cached(name, null)
        if is_first:
            content = {**self.identity, "statistics": self.statistics()}
            write_text(self.files.index, json.dumps(content, indent=2) + "\n")
            _log.info("latents: %s", self.files.folder)

    def statistics(self) -> dict[str, list[float]]:
        """Return mean and standard deviation of each channel of the latents, unscaled, over posteriors and places."""
        sums = (self.files.note(self.files.path(number)) for number in range(len(self.files)))
        count, first, second = sum(torch.tensor(part, dtype=torch.float64) for part in sums)
        mean = first / count
        return {"mean": mean.tolist(), "std": (second / count - mean**2).clamp(min=0).sqrt().tolist()}

    def _encoded(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Return the rows of a batch as they are kept."""
        model, size = self.model, len(self.model.source(batch))
        padded = self._on(device, batch)
        with autocast(self.precision, device.type):
            moments = model.first_stage_model.to(device).moments(padded[model.image_key])
            parts = self.conditioners.items()
            embedded = {EMBEDDED + name: part.to(device).embed(part.value(padded)) for name, part in parts}
        kept = {name: value for name, value in batch.items() if name not in self._superfluous}
        encoded = {"moments": moments.half() if self.settings.half else moments, **embedded}
        return {**{name: value[:size] for name, value in encoded.items()}, **kept}

    def _on(self, device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on a device, its last row repeated to the batch size: other sizes are computed otherwise."""
        count = len(self.model.source(batch))
        rows = [min(row, count - 1) for row in range(self.data.batch_size)]
        return {
            name: value[rows].to(device) if isinstance(value, Tensor) else [value[row] for row in rows]
            for name, value in batch.items()
        }

    def _sums(self, moments: Tensor) -> Tensor:
        """Return count, sum and sum of squares of each channel of the latents: float64 (3, C)."""
        moments, variance = moments.double(), torch.zeros(())
        if getattr(getattr(self.model.first_stage_model, "quantize", None), "double_z", False):
            posterior = DiagonalGaussian(moments)
            moments, variance = posterior.mean, posterior.var
        first, second = (value.sum(dim=(0, 2, 3)) for value in (moments, moments**2 + variance))
        return torch.stack([torch.full_like(first, moments[:, 0].numel()), first, second]).cpu()

    @property
    def _superfluous(self) -> set[str]:
        """Name the entries of a batch that nothing reads any more: images, and what only frozen conditioners take."""
        frozen, others = set(), set()
        for part in self.model.conditioners():
            keys = {part.key, *part.input_specs()}
            (frozen if part in self.conditioners.values() else others).update(keys)
        takes_tensors = {key for part in self.conditioners.values() for key in part.input_specs()}
        return {self.model.image_key} | (frozen & takes_tensors) - others

    # --- what it is made of ----------------------------------------------------------------------------------------

    def _check_index(self) -> None:
        index = self.files.index
        if not index.exists():
            return
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            other = [name for name, value in self.identity.items() if found.get(name) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{index}: is damaged; delete {self.files.folder}, and it is made anew") from error
        if other:
            what = f"is the cache of other {', '.join(other)}"
            raise UserError(f"{self.files.folder}: {what}; delete it, or set another {_PATH}.folder")

    def _identity(self, plan: Plan) -> Identity:
        """Return what decides the content: two caches of which it is equal are equal."""
        node, parts, settings = plan.config["data"]["params"].get("train"), plan.model["params"], self.settings
        contents = contents_of(self.data.train)
        conditioner = without_checkpoints(parts.get("conditioner")) if self.conditioners else None
        return {
            "format": _FORMAT,
            "data": {"items": len(self.data.train), "names": contents.names, "files": _hash(_files(node))},
            "transform": _hash(_without_files(node)),
            "views": [settings.views, settings.rows],
            "seed": self.data.seed,
            "precision": [self.precision, settings.half],
            "first stage": [_hash(without_checkpoints(parts["autoencoder"])), _weights(self.model.first_stage_model)],
            "conditioners": [_hash(conditioner), *(_weights(part) for part in self.conditioners.values())],
        }


def _frozen_conditioners(model: LatentDiffusion) -> dict[str, Conditioner]:
    """Return the conditioners with weights of which none is trained, by their names in the model."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, Conditioner) and not part.trainable}
    return {name: part for name, part in found.items() if any(True for _ in part.parameters())}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights(module: nn.Module) -> str:
    """Return a hash of names, types and values of all weights."""
    if (load := getattr(module, "load_weights", None)) is not None:
        load()
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _is_path(hint: Any) -> bool:
    return hint is Path or any(_is_path(part) for part in get_args(hint))


def _paths(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Find what is a path among the parameters of a node and of those within it."""
    if isinstance(value, dict):
        if is_node(value) and isinstance(params := value.get("params"), dict):
            hints = parameters_of(find_target(value["target"], "data")).hints
            yield from ((params, name) for name in params if _is_path(hints.get(name)))
        for child in value.values():
            yield from _paths(child)


def _without_files(node: Any) -> Any:
    """Return a node without its paths: moved data are the same."""
    copy = json.loads(json.dumps(node, default=str))
    for params, name in list(_paths(copy)):
        params.pop(name)
    return copy


def _files(node: Any) -> list[tuple[str, int]]:
    """List the files below all paths of a node, by name, with their sizes."""
    found: list[tuple[str, int]] = []
    for params, name in _paths(node):
        given = params[name] if isinstance(params[name], list) else [params[name]]
        for pattern in (str(value) for value in given if value is not None):
            path = Path(pattern).expanduser()
            for top in [path] if path.exists() else map(Path, sorted(glob(str(path)))):
                names = find_files(top) if top.is_dir() else [""]
                found += [(f"{name}:{file or top.name}", _size(top / file)) for file in names]
    return found


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nothing
        return -1
