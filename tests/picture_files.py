"""Small pictures on disk, for the tests of readers."""

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(index: int, height: int = 12, width: int = 16) -> np.ndarray:
    """Make a noise picture whose content tells its index."""
    return np.random.RandomState(index).randint(0, 256, (height, width, 3)).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(root: Path, count: int = 4, **size: int) -> list[str]:
    """Write a.png, sub/b.png ... below a folder; return their relative paths in order."""
    names = [f"{'sub/' if i % 2 else ''}{chr(97 + i)}.png" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(pixels(i, **size)))
    return sorted(names)


def write_tar(path: Path, indices, files=lambda i: {}) -> Path:
    """Write a shard with members 0003.png, 0003.txt, 0003.json ...; `files(i)` adds or replaces some, None removes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in indices:
            label = json.dumps({"class": i % 3, "meta": {"source": "test"}}).encode()
            members = {"png": png(pixels(i)), "txt": f"picture {i}".encode(), "json": label, **files(i)}
            for extension, content in members.items():
                if content is not None:
                    info = tarfile.TarInfo(f"{i:04d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


def address(content: bytes) -> str:
    """Return the text by which a browser sends a file."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
