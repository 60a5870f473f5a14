"""Files as people have them: which are images and which are litter, where links lead, what text is written in."""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageFile

from ldm.errors import UserError

__all__ = [
    "ARRAYS",
    "check_one_split",
    "decode_text",
    "existing_folder",
    "find_files",
    "find_images",
    "find_tables",
    "image_endings",
    "is_hidden",
    "is_litter",
    "is_split",
    "parse_json",
    "plain_text",
    "read_json",
    "read_lines",
    "read_text",
    "regular_file",
    "split_pattern",
    "written_path",
]

ARRAYS = (".npy",)
# What macOS, Windows and network drives write beside the files of a user.
_LITTER = (
    ".ds_store", ".appledouble", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir",
)  # fmt: skip
# Images of cameras and programs for which Pillow needs a plugin, or has none; only named to the user.
_FOREIGN = frozenset(
    ".heic .heif .hif .jxl .svg .exr .hdr .psb .xcf .dng .cr2 .cr3 .nef .nrw .arw .orf .raf .rw2 .pef .srw".split()
)
_BYTE_ORDER_MARK = "\ufeff"
# What names a split in a path, as on the Hugging Face hub: train-0000.tar, data/val-00000-of-00002.parquet, test/a.png
_SPLIT = re.compile(
    r"(?:^|[/._ -])(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev)"
    r"|(?P<test>test(?:ing)?|eval(?:uation)?))(?=[/._ -]|\d|$)",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-(\d{3,6})-of-(\d{3,6})(?=\.)")  # its number, and how many there are
_log = logging.getLogger(__name__)


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of the files that Pillow, with its plugins, decodes: `.jpg` ...; no videos and documents."""
    Image.init()
    found = {ending for ending, kind in Image.registered_extensions().items() if _is_decoded(kind)}
    return frozenset(found | {".mpo"})  # which Pillow reads as JPEG, without a registration of its own


def _is_decoded(kind: str) -> bool:
    if kind not in Image.OPEN or not Image.MIME.get(kind, "image/").startswith("image/"):
        return False
    factory = Image.OPEN[kind][0]
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def is_litter(name: str) -> bool:
    """Return whether a path, with forward slashes, is in what macOS or Windows add: ._a.jpg, Thumbs.db, __MACOSX/..."""
    return any(part.startswith("._") or part.lower() in _LITTER for part in name.split("/"))


def is_hidden(name: str) -> bool:
    """Return whether no reader takes a file of this path by itself: litter, and what begins with a dot."""
    return is_litter(name) or any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def existing_folder(root: str | Path) -> Path:
    """Return the folder as a path. Raises UserError if there is none."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{root}: {what}; set root to the folder of the images")
    return folder


def find_files(root: Path, endings: Collection[str] | None = None) -> list[str]:
    """List the files below a folder, through links, as sorted relative paths with forward slashes; no hidden ones.

    Links to nothing are listed, so that their readers name them; not pipes and devices, nor links to a folder above.
    endings: None for all.
    """
    names = _walk(root, [])
    return [name for name in names if endings is None or PurePosixPath(name).suffix.lower() in endings]


def find_images(root: Path, arrays: bool = False) -> list[str]:
    """List the images below a folder as `find_files` does, and the arrays (.npy) too or, by default, if there are none.

    Images that Pillow cannot read, pipes, devices and links to nothing are counted, the first is named in the log.
    """
    special: list[str] = []
    names = _walk(root, special)
    if special:
        first = min(special)
        _log.warning("%s: %d are pipes, devices or links to nothing, the first is %s", root, len(special), first)
    endings = [PurePosixPath(name).suffix.lower() for name in names]
    if foreign := Counter(ending for ending in endings if ending in _FOREIGN - image_endings()):
        first = next(name for name, ending in zip(names, endings, strict=True) if ending in foreign)
        kinds = ", ".join(f"{count} {ending}" for ending, count in foreign.most_common())
        _log.warning(
            "%s: images that cannot be read are left out: %s, the first is %s; convert them", root, kinds, first
        )
    wanted = {*image_endings(), *(ARRAYS if arrays else ())}
    found = [name for name, ending in zip(names, endings, strict=True) if ending in wanted]
    return found or [name for name, ending in zip(names, endings, strict=True) if ending in ARRAYS]


def _walk(root: Path, special: list[str]) -> list[str]:
    return sorted(_names(root, "", frozenset(), special), key=lambda name: name.split("/"))


def _names(folder: Path, inside: str, above: frozenset[tuple[int, int]], special: list[str]) -> Iterator[str]:
    """Return the files below a folder, through links unless one leads to a folder `above` it, by device and number."""
    try:
        status = folder.stat()
        here = status.st_dev, status.st_ino
        entries = [] if here in above else [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
    except OSError as error:
        _log.warning("%s: cannot be listed and is left out: %s", folder, error.strerror)
        return
    for entry in entries:
        name, is_link = f"{inside}{entry.name}", entry.is_symlink()  # a link may lead to itself, which `entry` refuses
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
            yield from _names(folder / entry.name, f"{name}/", above | {here}, special)
            continue
        is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
        if not is_file:
            special.append(name)
        if is_file or not os.path.exists(entry.path):
            yield name


def regular_file(path: Path) -> Path:
    """Return the path. Raises OSError unless it is a file: to read a pipe or a device would not end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("is no file but a folder, pipe or device")
    return path


def split_pattern(pattern: str) -> tuple[Path, str]:
    """Split a path with wildcards into the folders that exist under these very names, and the rest."""
    path = Path(pattern).expanduser()
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    return folder, path.relative_to(folder).as_posix()


def find_tables(given: str, ending: str, what: str, remedy: str, deep: bool = False) -> list[str]:
    """List the files that a path, a glob or a folder means; of a folder those with an ending, `deep` at any depth.

    Raises UserError, with `what` is absent and a `remedy`, if there are none, and for a folder of several splits or
    without some of its shards; of a glob absent shards are named in the log.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        folder, names = path, [name for name in find_files(path, [ending]) if deep or "/" not in name]
        check_one_split(given, names)
    else:
        folder, rest = split_pattern(given)
        names = [name for name in sorted(glob(rest, root_dir=folder)) if not is_litter(name)]
        names = [name for name in names if (folder / name).is_file()]
    if not names:
        problem = f"a folder without *{ending} files" if path.is_dir() else f"no such {what}"
        raise UserError(f"{given}: {problem}; {remedy}")
    if absent := _absent_shards(names):
        problem = f"{given}: lacks {len(absent)} of its shards, the first is {absent[0]}"
        if path.is_dir():
            raise UserError(f"{problem}; fetch it, or name those to be read by a pattern")
        _log.warning("%s", problem)
    return [str(folder / name) for name in names]


def is_split(folder: str) -> bool:
    """Return whether a folder of this name is a split of a data set: train, val, test ..."""
    return _SPLIT.fullmatch(folder) is not None


def check_one_split(given: str | Path, names: Iterable[str]) -> None:
    """Raise UserError if the paths below a folder name several splits, so that training would read validation data."""
    found: dict[str, str] = {}  # split -> the pattern, or the folder, that means it alone
    for name in names:
        for mark in list(_SPLIT.finditer(name))[-1:]:
            ending = "" if name[mark.end() :].startswith("/") else "*"
            found.setdefault(str(mark.lastgroup), f"{given}/{name[: mark.end()]}{ending}")
    if len(found) > 1:
        one = found.get("train") or found["validation"]
        raise UserError(f"{given}: holds the splits {', '.join(sorted(found))}; name one, such as {one}")


def _absent_shards(names: Collection[str]) -> list[str]:
    """List the names that files such as train-00002-of-00004.parquet say there are, and that are not among them."""
    marks = filter(None, map(_SHARD.search, names))
    series = {(mark.string[: mark.start(1)], mark.string[mark.end(1) :], len(mark[1]), int(mark[2])) for mark in marks}
    wanted = {f"{start}{i:0{digits}}{end}" for start, end, digits, total in series for i in range(total)}
    return sorted(wanted - set(names))


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 where its byte order mark says so, see `plain_text`. Raises UnicodeDecodeError."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return plain_text(content.decode("utf-16" if is_wide else "utf-8"))


def plain_text(text: str) -> str:
    r"""Return a text without byte order marks, and with \n at the end of its lines."""
    return text.replace(_BYTE_ORDER_MARK, "").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """Read a text file, see `decode_text`. Raises OSError and UnicodeDecodeError."""
    return decode_text(path.read_bytes())


def written_path(text: str) -> str:
    """Return a path as a list or a table has it, perhaps of Windows: no blanks around it, forward slashes."""
    return text.strip().replace("\\", "/")


def parse_json(text: str, **options: Any) -> Any:
    """Return what JSON says, with options of `json.loads`. Raises ValueError, also where it is nested too deep."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def read_json(path: Path, place: str) -> Any:
    """Read a JSON file. Raises UserError, which begins with `place`, if that fails."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:  # of which UnicodeDecodeError and JSONDecodeError are some
        raise UserError(f"{place}: cannot be read as JSON ({error})") from error


def read_lines(path: Path, remedy: str) -> list[str]:
    """Return the lines of a text file that are not empty. Raises UserError, with a remedy, if it cannot be read."""
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    return [line.strip() for line in lines if line.strip()]
