"""From what the command line of an evaluation names to objects: metrics, extractor, data sets, ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm import compat, config
from ldm.cli.common import choose_device
from ldm.cli.inputs import list_images, read_image
from ldm.config.overrides import apply_overrides, parse_override
from ldm.config.plain import resolve
from ldm.config.targets import did_you_mean, find_target, parameters_of
from ldm.config.types import mismatch
from ldm.data.core.decoding import UNREADABLE
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError
from ldm.evaluation.distribution_metrics import SET_METRICS, SetMetric
from ldm.evaluation.evaluation import Judges
from ldm.evaluation.extractors import Clip, Dino, Extractor, Inception, SceneNet
from ldm.evaluation.image_metrics import PICTURE_METRICS
from ldm.evaluation.image_sets import PictureSet

EXTRACTORS = {"inception": Inception, "dino": Dino, "clip": Clip, "scenenet": SceneNet}
_LONGEST_WAIT = timedelta(days=7)  # of a rank for the others, whose parts or search may take hours longer


def made(spec: str, known: Mapping[str, Any], flag: str, **offered: Any) -> Any:
    """Make what `name`, `name:key=value,key=value`, or a dotted target with the same options names.

    offered: values that are passed on where there is such a parameter. A function is given as it is. UserError for
    unknown names, parameters and values.
    """
    name, _, rest = spec.partition(":")
    if name not in known and "." not in name:
        hint = did_you_mean(name, known)
        raise UserError(f"{flag} {name}: unknown{hint or '; known are ' + ', '.join(known)}; or write a dotted target")
    target = known[name] if name in known else find_target(name, flag)
    given = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
    if not isinstance(target, type):
        if given:
            raise UserError(f"{flag} {spec}: {name} takes no options")
        return target
    parameters = parameters_of(target)
    unknown = [key for key in given if key not in parameters.names]
    if unknown:
        takes = ", ".join(parameters.names) or "nothing"
        raise UserError(f"{flag} {spec}: {unknown[0]} is unknown; {name} takes {takes}")
    hints = parameters.hints
    values = {key: _value(text, key, hints.get(key, Any), f"{flag} {spec}") for key, text in given.items()}
    values = {key: value for key, value in offered.items() if key in parameters.names} | values
    missing = [key for key in parameters.required if key not in values]
    if missing:
        raise UserError(f"{flag} {spec}: {missing[0]} is missing; write {name}:{missing[0]}=VALUE")
    return target(**values)


def _value(text: str, key: str, annotation: Any, place: str) -> Any:
    _, value = parse_override(f"{key}={text}")
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise UserError(f"{place}: {value} is not a positive number")
    problem = mismatch(value, annotation)
    if problem:
        raise UserError(f"{place}: {key}: {problem}")
    return value


def make_judges(specs: Sequence[str], extractor: str | None, device: torch.device, keep: int) -> Judges:
    """Make the metrics, and the extractor if one of them needs it. UserError for unknown ones, and for one twice."""
    sets, pictures = {}, {}
    for spec in specs:
        metric = made(spec, {**SET_METRICS, **PICTURE_METRICS}, "--metrics", device=device)
        place, name = (sets, spec.partition(":")[0]) if isinstance(metric, SetMetric) else (pictures, spec)
        if name in place:
            raise UserError(f"--metrics {spec}: {name} is asked for twice; name it once")
        if not callable(metric):
            raise UserError(f"--metrics {spec}: is no metric; it cannot be called with pictures and their batch")
        place[name] = metric
    made_one: Extractor | None = None
    if sets:
        if extractor is None:
            raise UserError(f"--extractor: {', '.join(sets)} need one of {', '.join(EXTRACTORS)}")
        made_one = made(extractor, EXTRACTORS, "--extractor").to(device)
    return Judges(sets, made_one, pictures, keep)


def with_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `data.key=value` to a config. UserError for what is not of this form."""
    wrong = [word for word in overrides if not word.startswith("data.") or "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]}: is not understood; overrides are data.key=value")
    return resolve(apply_overrides(content, overrides), throw_on_missing=False)


def data_set(content: Mapping[str, Any], split: str) -> Dataset:
    """Make the data set of a split that a config names. UserError if there is none."""
    data = compat.translate_node({key: (content.get("data") or {}).get(key) for key in ("target", "params")}, "data")
    node = (data.get("params") or {}).get(split)
    if not isinstance(node, dict):
        raise UserError(f"data.params.{split}: the config has none; use --reference FOLDER or FILE.npz")
    config.validate(node, f"data.params.{split}")
    return config.instantiate(node, f"data.params.{split}")


def folder_set(folder: str, limit: int | None = None) -> PictureSet:
    """Return the pictures of a folder as they are."""
    return PictureSet(_AsTheyAre(folder), folder, limit)


def scaled_folder_set(
    folder: str, size: tuple[int, int], limit: int | None = None, value_range: Sequence[float] | None = None
) -> PictureSet:
    """Return the pictures of a folder scaled and cut to a size, as data sets do by default."""
    pictures = ImageFolder(folder, size=list(size), value_range=value_range)
    return PictureSet(pictures, f"{folder}, its centres at {size[0]}x{size[1]}", limit)


class _AsTheyAre(Dataset):
    """Read the pictures below a folder without scaling any."""

    def __init__(self, folder: str) -> None:
        self.sources = list_images(folder, "--images")

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.sources[index].path
        try:
            return {"image": from_bytes(read_image(path, 3))}
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read ({error}); repair or remove it, then start again") from error


def join_ranks(options: argparse.Namespace) -> torch.device:
    """Choose the device; under torchrun also meet the other processes, each with its own accelerator."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)  # files are exchanged, not tensors
    if options.device == "auto" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    return choose_device(options.device)


def default_cache(out: Path) -> Path:
    """Return the folder where features of references are kept: beside the results, so that these share them."""
    return out.parent / "references"
