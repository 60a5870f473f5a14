"""Check what a run would read: counts, shapes, ranges, unreadable files, duplicates, keys that the model needs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ldm.config import instantiate
from ldm.config.nodes import without_checkpoints
from ldm.data.core.base import ImageDataset
from ldm.data.core.classes import class_names
from ldm.data.core.derived import source_of
from ldm.data.core.module import errors_of
from ldm.doctor.data_fit import fit_problems, missing_keys
from ldm.doctor.finding import Finding, saved
from ldm.doctor.item_sheet import item_sheet
from ldm.doctor.summary import Summary
from ldm.errors import UserError
from ldm.training.run import instantiate_training

__all__ = ["DataReport", "check_dataset", "examine_data", "num_to_read"]

Progress = Callable[[int | None, str], AbstractContextManager[Any]]  # of a number of steps; has `update()`
_SHOWN = 16
_CLASSES = 3  # that are named as the most frequent, and as the rarest


@dataclass(frozen=True)
class DataReport:
    """What was found in a data set: lines of figures, lines of problems, and a sheet of its first items.

    images: fingerprints of the images that were read.
    """

    lines: list[str]
    problems: list[str]
    sheet: Image.Image
    images: frozenset[bytes] = frozenset()


def examine_data(config: Mapping[str, Any], num: int, outdir: Path, progress: Progress) -> Iterator[Finding]:
    """Yield what `num` items (0: all) of each data set of a config are, and write their sheets, OUTDIR/{train,...}.png.

    Raises UserError for a config that cannot be built, a set of which nothing can be read, and an OUTDIR that cannot be
    written.
    """
    if "data" not in config:
        raise UserError("--base: there is no section data")
    data, model = instantiate(config["data"], "data"), _model(config)
    trained_on: frozenset[bytes] = frozenset()
    for name in ("train", "validation", "test"):
        dataset = getattr(data, name, None)
        if dataset is None:
            continue
        with progress(num_to_read(dataset, num), name) as bar:
            try:
                report = check_dataset(dataset, num, model, bar.update)
            except UserError as error:
                raise UserError(f"data.params.{name}: {error}") from error
        shared = len(report.images & trained_on)
        leaks = [f"{shared:,} of these images are in train, too: figures on them say little"] if shared else []
        trained_on |= report.images if name == "train" else frozenset()
        problems = [f"{name}: {problem}" for problem in report.problems]
        sheet = saved(report.sheet, outdir / f"{name}.png")
        title, *lines = report.lines
        yield Finding(f"{name}: {title}", lines=[*lines, *leaks], images=[sheet], problems=problems)


def check_dataset(
    dataset: Dataset, num: int = 0, model: nn.Module | None = None, on_item: Callable[[], Any] = lambda: None
) -> DataReport:
    """Read items, and compare each key with its definition: images in [-1, 1], maps of class indices, boxes in [0, 1].

    Raises UserError if no item can be read.

    Args:
        num: how many items to read, evenly spread, of a stream the first ones; 0 for all.
        model: whose needs to compare, may be on meta.
        on_item: called after each item.
    """
    summary, shown, prints = Summary(), [], Counter[bytes]()
    for item, is_replacement in _items(dataset, num):
        summary.add(item)
        shown += [item] if len(shown) < _SHOWN else []
        prints.update([] if is_replacement else _fingerprints(item.get("image")))
        on_item()
    if not summary.num_items:
        raise UserError("no item can be read")
    problems = summary.problems()
    if model is not None:
        problems += [*missing_keys(model, summary.keys), *fit_problems(model, summary, class_names(dataset))]
    lines = [_heading(dataset, summary.num_items), *summary.lines(), *_counts(dataset, summary, prints)]
    return DataReport(lines, problems, item_sheet(shown), frozenset(prints))


def num_to_read(dataset: Dataset, num: int) -> int | None:
    """Return how many items `check_dataset` reads; None if that is not known."""
    if isinstance(dataset, IterableDataset):
        return num or None
    return min(num or len(dataset), _num_different(dataset))


def _model(config: Mapping[str, Any]) -> nn.Module | None:
    """Build the training of a config, or its model alone, without memory and without weights."""
    if "model" not in config:
        return None
    bare = without_checkpoints(config)
    with torch.device("meta"):
        return instantiate_training(bare) if "training" in bare else instantiate(bare["model"], "model")


def _num_different(dataset: Dataset) -> int:
    """Return the number of items of an epoch, each once where `repeats` gives other crops of it."""
    return min(len(dataset), getattr(source_of(dataset), "num_files", len(dataset)))


def _items(dataset: Dataset, num: int) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield items, and whether each takes the place of one that cannot be read."""
    if isinstance(dataset, IterableDataset):
        yield from ((item, False) for item in islice(iter(dataset), num or None))
        return
    source, different = source_of(dataset), _num_different(dataset)
    errors = source.errors if isinstance(source, ImageDataset) else None
    for index in np.unique(np.linspace(0, different - 1, num_to_read(dataset, num)).round().astype(int)).tolist():
        yield dataset[index], errors is not None and errors.is_unreadable(index)


def _fingerprints(image: Any) -> list[bytes]:
    """Return what equal images have in common, and mirror images too; nothing for what is no image."""
    if not isinstance(image, torch.Tensor | np.ndarray) or not image.ndim:
        return []
    tensor = torch.as_tensor(image)
    sides = (side.contiguous().cpu().numpy().tobytes() for side in (tensor, tensor.flip(-1)))
    return [min(hashlib.blake2b(side, digest_size=16).digest() for side in sides)]


def _heading(dataset: Dataset, num_items: int) -> str:
    source = source_of(dataset)
    inner = "" if source is dataset else f" of {type(source).__name__}"
    amount = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} items"
    return f"{type(dataset).__name__}{inner}, {amount}, {num_items:,} read"


def _counts(dataset: Dataset, summary: Summary, prints: Counter[bytes]) -> list[str]:
    errors, names, lines = errors_of(dataset), class_names(dataset), []
    if errors is not None and errors.num_unreadable:
        lines.append(f"{errors.num_unreadable:,} files cannot be read, of those that were tried; see the messages")
    if errors is not None and errors.num_empty:
        empty = "captions are empty, or masks without a hole or all hole"
        lines.append(f"{errors.num_empty:,} {empty}, of those that were read; see the messages")
    if duplicates := prints.total() - len(prints):
        lines.append(f"{duplicates:,} images are equal to an earlier one, or to its mirror image")
    if names:
        lines.append(f"{len(names)} classes: {', '.join(names[:10])}{' ...' * (len(names) > 10)}")
    if counts := summary.counts("class_label"):
        lines.append(_balance(counts, names))
    return lines


def _balance(counts: Counter[float], names: list[str]) -> str:
    """Describe how often the classes occur: the most frequent and the rarest, and how many do not."""

    def named(label: float, count: int) -> str:
        return f"{names[int(label)] if 0 <= label < len(names) else label} {count:,}"

    ranked = counts.most_common()
    most = ", ".join(named(*entry) for entry in ranked[:_CLASSES])
    fewest = ", ".join(named(*entry) for entry in reversed(ranked[_CLASSES:][-_CLASSES:]))
    absent = len(set(range(len(names))) - set(counts))
    parts = [f"most often {most}", f"seldom {fewest}" if fewest else "", f"{absent} not among them" if absent else ""]
    return f"class_label of the items that were read: {'; '.join(filter(None, parts))}"
