"""The samples of WebDataset shards: the files of a tar that share a name up to the first dot are one sample.

`fields` maps the keys of a batch to their sources: {caption: txt} reads the text of NAME.txt, {class_label: json.class}
the entry `class` of NAME.json (more dots lead further in); {image: left.png} chooses among several images.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import numpy as np

from ldm.allowance import COMMANDS, allowed
from ldm.data.core.files import decode_text, find_tables, image_endings, is_hidden, parse_json, split_pattern
from ldm.data.readers.columns import LABEL, drawn_entry, is_nothing, whole_number
from ldm.errors import UserError, shown

__all__ = ["ABSENT", "Fields", "FirstOfEach", "Member", "expand_urls", "index_tar", "is_remote", "split_name"]

_DECODED = ("json",)  # files in which a field may name an entry
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names that the webdataset library keeps for itself
_REMEDY = "set urls to tar files, a folder of them, or a pattern"
# What may stand in an address: the library hands it to a shell between quotes, so that a quote would end it.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[\w.~:/?#\[\]@!&()*+,;=%-]*")
_DAMAGED = (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError)
_log = logging.getLogger(__name__)


class Member(NamedTuple):
    """The first byte and the number of bytes of a file in an uncompressed tar."""

    start: int
    size: int

    def read(self, tar: str) -> bytes:
        """Read the bytes from a tar. Raises OSError if it is shorter, and for ABSENT."""
        if self == ABSENT:
            raise OSError("not in the shard, which is damaged, or lacks it")
        with open(tar, "rb") as stream:
            stream.seek(self.start)
            content = stream.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{tar} is cut off")
        return content


ABSENT = Member(0, -1)


def is_remote(url: str) -> bool:
    """Return whether the webdataset library has to open a shard: http:, s3:, pipe: ..."""
    return ":" in url.split("/")[0] and not Path(url).exists()


def expand_urls(urls: str | Path | Sequence[str | Path]) -> list[str]:
    """List the shards that paths, folders, globs and braces (`train-{0000..0003}.tar`) mean.

    Raises UserError for absent ones, for commands (`pipe:`) that are not allowed, and for what is no address.
    """
    given = [urls] if isinstance(urls, (str, Path)) else list(urls)
    shards: list[str] = []
    for pattern in given:
        if is_remote(str(pattern)):
            shards += map(_checked, braceexpand.braceexpand(str(pattern)))
            continue
        folder, rest = split_pattern(str(pattern))  # folders and files may have such letters in their own names
        names = [rest] if (folder / rest).exists() else braceexpand.braceexpand(rest)
        shards += [shard for name in names for shard in find_tables(str(folder / name), ".tar", "shard", _REMEDY)]
    if not shards:
        raise UserError(f"{urls}: no shards; {_REMEDY}")
    return shards


def _checked(url: str) -> str:
    """Return the address of a shard. UserError for one that would run a command: a config may come from a stranger."""
    if url.lower().startswith(COMMANDS):
        if COMMANDS not in allowed():
            raise UserError(f"{shown(url)}: runs a command; if it is yours, give --allow {COMMANDS}")
    elif not _ADDRESS.fullmatch(url):
        raise UserError(f"{shown(url)}: is no address of a shard; write quotes, spaces and $ as %27, %20 and %24")
    return url


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into sample and extension: a/b.left.PNG -> (a/b, left.png)."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def is_part(name: str) -> bool:
    """Return whether a member of this name belongs to a sample."""
    key, extension = split_name(name)
    return bool(extension) and key[-1:] not in ("", "/") and not is_hidden(name) and not _RESERVED.match(name)


class FirstOfEach:
    """Say of the members of a shard, in its order, whether each is the first of its name; name the first other one."""

    def __init__(self, shard: str) -> None:
        self._shard, self._seen, self._warned = shard, set(), False

    def __call__(self, name: str) -> bool:
        """Return whether no member before belonged to the same sample with the same extension."""
        part = split_name(name)
        if part in self._seen and not self._warned:
            self._warned = True
            _log.warning("%s: %s is there again; the first of each name counts", self._shard, name)
        is_first = part not in self._seen
        self._seen.add(part)
        return is_first


def index_tar(path: str) -> tuple[dict[str, dict[str, Member]], str | None]:
    """Return the samples of a local tar, name -> extension -> member, and what is wrong with it, or None.

    Of a damaged tar the samples before the damage are returned.
    """
    samples: dict[str, dict[str, Member]] = {}
    is_first = FirstOfEach(path)
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.size < 0 or info.offset_data + info.size > length:
                    return samples, f"{info.name} is cut off"
                if info.isfile() and is_part(info.name) and is_first(info.name):
                    key, extension = split_name(info.name)
                    samples.setdefault(key, {})[extension] = Member(info.offset_data, info.size)
    except _DAMAGED as error:
        return samples, f"not a readable uncompressed tar ({error}); stream others by Shards"
    return samples, None


class Fields:
    """Read the keys of a batch from a sample, given as extension -> content."""

    def __init__(self, fields: Mapping[str, str] | None) -> None:
        self.sources = {"caption": "txt"} if fields is None else dict(fields)
        self.image = self.sources.pop("image", None)

    @property
    def extensions(self) -> set[str]:
        """Return the extensions that are read besides that of the image."""
        return {self._split(source)[0] for source in self.sources.values()}

    @staticmethod
    def _split(source: str) -> tuple[str, list[str]]:
        """Split json.a.b into the extension and the path in the file; other sources are extensions."""
        first, *path = source.split(".")
        return (first, path) if first in _DECODED else (source, [])

    def is_needed(self, name: str) -> bool:
        """Return whether a member of a tar is read."""
        extension = split_name(name)[1]
        return is_part(name) and (extension in self.extensions or self.is_image(extension))

    def is_image(self, extension: str) -> bool:
        """Return whether a file of this extension is the image."""
        return extension == self.image if self.image else f".{extension.rpartition('.')[2]}" in image_endings()

    def image_of(self, extensions: Sequence[str]) -> str | None:
        """Return the extension of the image of a sample, None if there is none."""
        return min((extension for extension in extensions if self.is_image(extension)), key=_plain_first, default=None)

    def problem(self, extensions: Sequence[str]) -> str | None:
        """Return what is missing in a sample with these files, None if it is complete."""
        have = f"it has {', '.join(sorted(extensions)) or 'no file that is asked for'}"
        if self.image_of(extensions) is None:
            return f"has no image, {have}"
        for key, source in self.sources.items():
            if self._split(source)[0] not in extensions:
                return (
                    f"has no {self._split(source)[0]} for {key!r}, {have}; "
                    f"set fields.{key}, or fields={{}} for images only"
                )
        return None

    def read(self, content: Callable[[str], bytes], rng: np.random.Generator) -> dict[str, Any]:
        """Return all keys but the image, drawn from lists. Raises ValueError for absent entries and damaged files."""
        values: dict[str, Any] = {}
        for key, source in self.sources.items():
            extension, path = self._split(source)
            text = decode_text(content(extension))
            value = _entry(key, parse_json(text), path) if extension in _DECODED else text
            if is_nothing(value):
                raise ValueError(f"{source} for {key!r} is empty")
            try:
                value = drawn_entry(key, value, rng)
            except ValueError as error:
                raise ValueError(f"{source} for {error}") from error
            is_class = extension == "cls" or key == LABEL
            values[key] = _class(source, value) if is_class else value
        return values


def _entry(key: str, value: Any, path: Sequence[str]) -> Any:
    for step in path:
        if not isinstance(value, dict) or step not in value:
            have = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"json has no {'.'.join(path)} for {key!r}, it has {have}; set fields.{key}")
        value = value[step]
    return value


def _class(source: str, label: Any) -> Any:
    """Return a label as a number; a name stays, but an empty one, and one in a .cls file, is no class."""
    number = whole_number(label)
    if number is None and (source == "cls" or not str(label).strip()):
        raise ValueError(f"{source} holds {label!r}, which is no number of a class")
    return label if number is None else number


def _plain_first(extension: str) -> tuple[bool, str]:
    return "." in extension, extension
