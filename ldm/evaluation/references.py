"""Features of real images, from the data set's own transform: cached by content, or exchanged as .npz files of ADM.

A cached file is named by the hash of the images (bytes, after the transform) and that of the extractor, so that neither
another crop nor another file can be mistaken for it; the images are read each time to find that name. An .npz has mu,
sigma and, for extractors with spatial features, mu_s, sigma_s (Dhariwal & Nichol 2021); ours also names the extractor.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm import distributed
from ldm.data.core.pixels import to_bytes
from ldm.errors import UserError
from ldm.evaluation.distributions import Moments, ReferenceStatistics
from ldm.evaluation.extractors import Extractor, Features, file_hash
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.resumable import Columns, ResumableMap, wait_for_all

_log = logging.getLogger(__name__)
_PART = 256


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Statistics of real images with their provenance: source, count, sha256, size."""

    statistics: ReferenceStatistics
    provenance: dict[str, Any]


def columns_of(features: Features) -> Columns:
    """Return the tensors of features by name, without absent ones."""
    return {name: tensor for name, tensor in features._asdict().items() if tensor is not None}


def features_of(columns: Columns) -> Features:
    """Return the features of `columns_of`."""
    return Features(**{name: columns.get(name) for name in Features._fields})


def made_by(extractor: Extractor) -> str:
    """Return the name of an extractor and the hash of its weights."""
    return f"{extractor.name} {extractor.hash}"


def data_reference(
    images: ImageSet, extractor: Extractor, cache: Path, on_images: Callable[[int], None] = lambda count: None
) -> ReferenceSet:
    """Return statistics of a data set's images, from the cache if they are there; it goes on with what a stop left."""
    sha256 = images.digest()
    folder = cache / f"{sha256[:16]}-{extractor.name}-{extractor.hash[:8]}"

    def compute(positions: range) -> Columns:
        on_images(len(positions))
        return columns_of(extractor(to_bytes(images.batch(positions)["image"])))

    settings = {"images": sha256, "extractor": extractor.name, "weights": extractor.hash}
    features = features_of(ResumableMap(folder, len(images), _PART, settings).run(compute))
    provenance = {"source": images.name, "count": len(images), "sha256": sha256, "size": list(images.shape[1:])}
    return ReferenceSet(ReferenceStatistics.of(features, made_by(extractor)), provenance)


def read_npz(path: Path) -> ReferenceSet:
    """Read moments as ADM publishes them. UserError for what is no such file."""
    try:
        with zipfile.ZipFile(path):  # np.load gives other things for other files
            pass
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if not {"mu", "sigma"} <= names:
                raise UserError(f"{path}: holds {', '.join(sorted(names))}; a reference has mu and sigma")
            pooled = _moments(path, arrays["mu"], arrays["sigma"])
            spatial = _moments(path, arrays["mu_s"], arrays["sigma_s"]) if {"mu_s", "sigma_s"} <= names else None
            count = int(arrays["count"]) or None if "count" in names else None
            maker = str(arrays["extractor"]) if "extractor" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no .npz file of plain arrays ({error})") from error
    provenance = {"source": str(path), "count": count, "sha256": file_hash(path)}
    return ReferenceSet(ReferenceStatistics(count, pooled, spatial, made_by=maker), provenance)


def _moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mean {mean.shape} and covariance {covariance.shape} do not fit together")
    return Moments(mean.astype(np.float32), covariance.astype(np.float64))


def write_npz(path: Path, reference: ReferenceStatistics) -> None:
    """Write moments as ADM does, with the number of images. UserError if the file cannot be written."""
    arrays = {
        "mu": reference.pooled.mean,
        "sigma": reference.pooled.covariance,
        "count": np.array(reference.count or 0),
    }
    if reference.made_by is not None:
        arrays["extractor"] = np.array(reference.made_by)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if distributed.rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **arrays)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    wait_for_all()
