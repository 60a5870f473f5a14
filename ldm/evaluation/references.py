"""Features of real pictures: measured through the data set's own transform, kept by content, and as .npz of ADM.

A cached file is named by the hash of the pictures (as bytes, after the transform) and that of the extractor, so that
neither another crop nor another file can be mistaken for it; the pictures are read each time to find that name. An
.npz holds mu, sigma and, where the extractor knows places, mu_s, sigma_s (Dhariwal & Nichol 2021); ours also names the
extractor.
"""

from __future__ import annotations

import hashlib
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
from ldm.evaluation.distribution_metrics import Moments, Reference
from ldm.evaluation.extractors import Extractor, Features
from ldm.evaluation.image_sets import PictureSet
from ldm.evaluation.resumable import Columns, Parts, wait_for_all

_log = logging.getLogger(__name__)
_PART = 256


@dataclass(frozen=True, eq=False)
class Referenced:
    """Hold a reference with where it is from: its source, number and hash."""

    reference: Reference
    record: dict[str, Any]


def columns_of(features: Features) -> Columns:
    """List the tensors that there are, by name."""
    return {name: tensor for name, tensor in features._asdict().items() if tensor is not None}


def features_of(columns: Columns) -> Features:
    """Put together what `columns_of` listed."""
    return Features(**{name: columns.get(name) for name in Features._fields})


def maker(extractor: Extractor) -> str:
    """Name an extractor and its weights."""
    return f"{extractor.name} {extractor.hash}"


def data_reference(
    pictures: PictureSet, extractor: Extractor, cache: Path, on_pictures: Callable[[int], None] = lambda count: None
) -> Referenced:
    """Return the features of a data set's pictures, from the cache if they were made before; parts outlive a stop."""
    sha256 = pictures.digest()
    folder = cache / f"{sha256[:16]}-{extractor.name}-{extractor.hash[:8]}"

    def compute(positions: range) -> Columns:
        on_pictures(len(positions))
        return columns_of(extractor(to_bytes(pictures.batch(positions)["image"])))

    known = {"pictures": sha256, "extractor": extractor.name, "weights": extractor.hash}
    features = features_of(Parts(folder, len(pictures), _PART, known).run(compute))
    record = {"source": pictures.name, "count": len(pictures), "sha256": sha256, "size": list(pictures.shape[1:])}
    return Referenced(Reference.of(features, maker(extractor)), record)


def read_npz(path: Path) -> Referenced:
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
            made_by = str(arrays["extractor"]) if "extractor" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no .npz file of plain arrays ({error})") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"source": str(path), "count": count, "sha256": digest}
    return Referenced(Reference(count, pooled, spatial, made_by=made_by), record)


def _moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mean {mean.shape} and covariance {covariance.shape} do not fit together")
    return Moments(mean.astype(np.float32), covariance.astype(np.float64))


def write_npz(path: Path, reference: Reference) -> None:
    """Write moments as ADM does, with the number of pictures. UserError if the place cannot be written."""
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
