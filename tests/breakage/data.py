"""Data as people have them, generated: trees with links and litter, tables, tars and masks, and what each means.

Everything is a function of a generator; the expectation is made beside the files, without the readers.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 8
FORMATS = {
    ".png": "PNG", ".PNG": "PNG", ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".TIFF": "TIFF", ".gif": "GIF",
    ".ppm": "PPM", ".pnm": "PPM", ".jpg": "JPEG", ".jpe": "JPEG",
    ".jfif": "JPEG", ".webp": "WEBP", ".tga": "TGA", ".pcx": "PCX",
    ".jp2": "JPEG2000", ".avif": "AVIF",
}  # fmt: skip
FOREIGN = (".heic", ".svg", ".nef", ".jxl")
LITTER = (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "__MACOSX/._0.png", "__MACOSX/0.png", ".hidden/0.png")
CAPTIONS = ("a red ball", "a hat, on grass", 'a "blue" hat', "", "ein Hündchen", "two\nlines", "帽子", "3", " spaced ")


def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))


def encoded(content: Image.Image, ending: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    content.save(buffer, FORMATS[ending], **options)
    return buffer.getvalue()


def written(text: str, rng: np.random.Generator) -> bytes:
    """Encode a text as one of the programs that people use does."""
    windows = text.replace("\n", "\r\n")
    ways = (
        text.encode(),
        text.encode("utf-8-sig"),
        windows.encode("utf-8-sig"),
        windows.encode("utf-16"),
        f"{text}\n".encode(),
    )
    return ways[int(rng.integers(len(ways)))]


def chosen(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


@dataclass
class Tree:
    """A folder, and the captions of the images that every reader should find in it, by name."""

    root: Path
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted(self.captions, key=lambda name: name.split("/"))


def tree(folder: Path, rng: np.random.Generator, num: int = 6) -> Tree:
    """Write images with texts beside them, in folders of which some are links; loops, litter, pipes, other endings."""
    found = Tree(folder / "root")
    places = {"": found.root, "b/": found.root / "b", "b/é ü/": found.root / "b" / "é ü"}
    elsewhere = folder / "elsewhere"
    for path in (*places.values(), elsewhere / "deep"):
        path.mkdir(parents=True, exist_ok=True)
    inside = {"linked/": elsewhere, "linked/deep/": elsewhere / "deep"} if rng.random() < 0.7 else {}
    if inside:
        (found.root / "linked").symlink_to(elsewhere, target_is_directory=True)
        (elsewhere / "deep" / "loop").symlink_to(chosen(rng, (elsewhere, found.root)), target_is_directory=True)
    if rng.random() < 0.5:
        (found.root / "b" / "back").symlink_to(chosen(rng, ("..", ".", "../b")), target_is_directory=True)
    for i in range(num):
        name, path = chosen(rng, list({**places, **inside}.items()))
        stem, ending, text = (
            chosen(rng, (f"{i}", f"{i} x", f"_{i}", f"ж{i}")),
            chosen(rng, list(FORMATS)),
            chosen(rng, CAPTIONS),
        )
        content = encoded(image(rng), ending)
        if rng.random() < 0.2:
            (folder / f"{i}.content").write_bytes(content)
            (path / f"{stem}{ending}").symlink_to(folder / f"{i}.content")
        else:
            (path / f"{stem}{ending}").write_bytes(content)
        (path / f"{stem}{chosen(rng, ('.txt', '.txt', '.TXT'))}").write_bytes(written(text, rng))
        found.captions[f"{name}{stem}{ending}"] = text.strip()
    for name in rng.choice(LITTER, 3, replace=False):
        path = chosen(rng, list(places.values())) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7" + rng.bytes(30))
    (found.root / f"foreign{chosen(rng, FOREIGN)}").write_bytes(rng.bytes(30))
    os.mkfifo(found.root / f"pipe{chosen(rng, ('.png', '.txt', '.tar'))}")
    return found


def tar_of(found: Tree, path: Path) -> Path:
    """Pack a tree as a tar with everything in it, links followed, litter included."""
    with tarfile.open(path, "w", dereference=True) as archive:
        for name in sorted(_all_files(found), key=lambda name: (name.rpartition(".")[0], name)):
            archive.add(found.root / name, name)
    return path


def _all_files(found: Tree) -> Iterator[str]:
    for name in found.captions:
        stem = name.rpartition(".")[0]
        yield from (name, next(text for text in (f"{stem}.txt", f"{stem}.TXT") if (found.root / text).exists()))
    for path in found.root.rglob("*"):
        name = path.relative_to(found.root).as_posix()
        if path.is_file() and any(
            part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/")
        ):
            yield name


@dataclass
class Rows:
    """Rows of a table of files, captions and labels, and those that every reader should take."""

    rows: list[dict[str, Any]]
    kept: list[dict[str, Any]]


def rows(rng: np.random.Generator, num: int = 6) -> Rows:
    """Make rows with gaps, litter and labels of one kind: numbers in any spelling, or names."""
    numbers, names = ("0", "7", "3.0", 5, 2.0, " 4 "), ("²", "cat", "1a", "x,y", "dog")
    labels = chosen(rng, (numbers, names, numbers + names))
    found = Rows([], [])
    for i in range(num):
        row = {"file": f"{i}.png", "caption": chosen(rng, CAPTIONS), "label": chosen(rng, labels)}
        is_whole = True
        if rng.random() < 0.3:
            key, value = chosen(
                rng, (("label", ""), ("label", "  "), ("file", "._0.png"), ("file", "a/Thumbs.db"), ("file", ""))
            )
            row[key], is_whole = value, False
        found.rows.append(row)
        found.kept += [row] if is_whole else []
    return found


def write_table(found: Rows, path: Path, rng: np.random.Generator) -> Path:
    """Write rows as a CSV, TSV or JSON lines file, by its ending, with or without a byte order mark."""
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=bool(rng.integers(2))) for row in found.rows)
    else:
        buffer = io.StringIO()
        delimiter = chosen(rng, (",", ";")) if path.suffix == ".csv" else "\t"
        writer = csv.DictWriter(buffer, ["caption", "label", "file"], delimiter=delimiter)
        writer.writeheader()
        way = chosen(rng, ("{}", " {}", ".\\{}", "./{} "))
        writer.writerows([row | {"file": row["file"] and way.format(row["file"])} for row in found.rows])
        text = buffer.getvalue()
    path.write_bytes(text.encode(chosen(rng, ("utf-8", "utf-8-sig", "utf-16"))))
    return path


def tar(path: Path, rng: np.random.Generator, num: int = 6) -> list[str]:
    """Write a shard with duplicates, litter, reserved names and incomplete samples; return the captions to be read."""
    texts = []
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for i in range(num):
            key, text = f"{chosen(rng, ('', './', 'a/', 'a.b/'))}{i}", chosen(rng, [text for text in CAPTIONS if text])
            picture, caption = encoded(image(rng), ".png"), written(text, rng)
            members = [(f"{key}.{chosen(rng, ('png', 'PNG', 'jfif'))}", picture), (f"{key}.txt", caption)]
            kind = int(rng.integers(6))
            if kind == 0:
                members.append(chosen(rng, ((f"{key}.txt", b"another"), (f"{key}.TXT", b"another"))))
            elif kind == 1:
                members.pop(int(rng.integers(2)))
            elif kind == 2:
                members += [(chosen(rng, LITTER), b"litter"), (f"__meta__/{i}.png", picture), ("__info__.txt", b"x")]
            elif kind == 3:
                members += [(f"{i}.again.png", picture), *members]  # the whole sample once more
            for name, content in members:
                add(name, content)
            texts += [] if kind == 1 else [text.strip()]
    return texts


MASKS = (
    "L", "RGB", "1", "I;16", "zero and one", "black is 1", "soft", "palette", "white first", "coloured palette",
    "grey palette", "clear hole", "black with a clear hole", "colours and opaque alpha", "jpeg", "turned",
)  # fmt: skip


def mask(path: Path, kind: str, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """Write a mask of a kind without its ending; return its file, and its hole (SIDE, 2 SIDE) as bool."""
    hole = np.kron(rng.random((2, 2)) < 0.5, np.ones((SIDE // 2, SIDE), bool)).astype(bool)
    hole[: SIDE // 2, :SIDE], hole[SIDE // 2 :, SIDE:] = True, False  # something of both
    white, ending, options = np.where(hole, 255, 0).astype(np.uint8), ".png", {}
    if kind in ("L", "RGB", "1", "grey palette"):
        content = Image.fromarray(white).convert({"grey palette": "P"}.get(kind, kind))
    elif kind == "I;16":
        content = Image.fromarray(np.where(hole, 40_000, 20_000).astype(np.uint16))
    elif kind == "zero and one":
        content = Image.fromarray(hole.astype(np.uint8))
    elif kind == "black is 1":
        content = Image.fromarray(np.maximum(white, 1))
    elif kind == "soft":
        content = Image.fromarray(
            np.where(hole, rng.integers(128, 255, hole.shape), rng.integers(0, 128, hole.shape)).astype(np.uint8)
        )
    elif kind in ("palette", "white first", "coloured palette"):
        content = Image.fromarray((hole ^ (kind == "white first")).astype(np.uint8)).convert("P")
        colours = {"palette": (0, 0, 0, 255, 255, 255), "white first": (255, 255, 255, 0, 0, 0)}
        content.putpalette(colours.get(kind, (0, 0, 0, 90, 0, 0)))
    elif kind in ("clear hole", "black with a clear hole"):
        colour = np.full((*hole.shape, 3), 255 if kind == "clear hole" else 0, np.uint8)
        content = Image.fromarray(np.dstack([colour, 255 - white]))
    elif kind == "colours and opaque alpha":
        content = Image.fromarray(np.dstack([white, white, white, np.full_like(white, 255)]))
    elif kind == "jpeg":
        content, ending, options = Image.fromarray(white), ".jpg", {"quality": 95}
    else:
        exif = Image.Exif()
        exif[274] = 6  # shown turned by 90 degrees to the right
        content, options = Image.fromarray(np.rot90(white)), {"exif": exif}
    file = path.with_suffix(ending)
    content.save(file, **options)
    return file, hole
