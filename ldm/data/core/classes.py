"""What the labels of a data set stand for, where they were numbered by the names of classes that it holds."""

from __future__ import annotations

from torch.utils.data import Dataset

from ldm.data.core.base import ImageDataset
from ldm.data.core.derived import source_of
from ldm.errors import UserError

__all__ = ["class_names", "insist_on_same_classes"]


def class_names(dataset: Dataset | None) -> list[str]:
    """List the classes of a data set by label; empty if it has none, or if its labels were numbers from the start."""
    source = source_of(dataset)
    return list(source.class_names) if isinstance(source, ImageDataset) else []


def insist_on_same_classes(place: str, dataset: Dataset | None, train: Dataset | None) -> None:
    """Raise UserError, naming the difference, if a data set numbers named classes otherwise than the training set."""
    found, wanted = class_names(dataset), class_names(train)
    if not found or not wanted or found == wanted:
        return
    lacking, further = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [f"lacks {_listed(lacking)}"] if lacking else []
    parts += [f"has {_listed(further)} in addition"] if further else []
    raise UserError(
        f"{place}: {' and '.join(parts) or 'has them in another order'}, compared with the {len(wanted)} classes of "
        "the training set, so that labels would mean something else; take both from one folder or table (split, "
        "validation_share), give both the same classes, or (ImageNet) leave label_order out"
    )


def _listed(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{len(names)} classes, first {names[0]!r},"
