"""The names of a data set's classes, and a check that training and validation data number them alike."""

from __future__ import annotations

from torch.utils.data import Dataset

from ldm.data.core.derived import source_of
from ldm.errors import UserError

__all__ = ["check_same_classes", "class_names"]


def class_names(dataset: Dataset | None) -> list[str]:
    """List the classes of a data set by label; empty if it has none, or if the data came with numbers."""
    names = getattr(source_of(dataset), "class_names", None)
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if is_list else []  # a data set of one's own may mean something else by this name


def check_same_classes(place: str, dataset: Dataset | None, train: Dataset | None) -> None:
    """Raise UserError, with the difference, if a data set numbers named classes in another way than the training set.

    place: the config path of `dataset`, for the message.
    """
    found, wanted = class_names(dataset), class_names(train)
    if not found or not wanted or found == wanted:
        return
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [f"lacks {_listed(missing)}"] if missing else []
    parts += [f"has {_listed(extra)} in addition"] if extra else []
    raise UserError(
        f"{place}: {' and '.join(parts) or 'has them in another order'}, compared with the {len(wanted)} classes of "
        "the training set, so that labels would mean something else; take both from one folder or table (split, "
        "validation_share), give both the same classes, or (ImageNet) leave label_order out"
    )


def _listed(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{len(names)} classes, first {names[0]!r},"
