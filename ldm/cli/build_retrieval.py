"""Embed the images of a folder with CLIP: the database from which retrieval-augmented models are conditioned.

    ldm build-retrieval --indir IMAGES --out databases/mine.npz

CLIP is read from a local folder or the Hugging Face cache (--clip); nothing is downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from ldm.cli.entry import main_guard
from ldm.cli.inputs import list_images, readable
from ldm.cli.options import TaskParser, choose_device, progress
from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.embeddings import Database
from ldm.data.readers.single_images import read_image
from ldm.errors import UserError

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the database of a folder."""
    parser = TaskParser("build-retrieval", __doc__)
    add = parser.add_argument
    add("--indir", required=True, metavar="PATH", help="a folder of images, at any depth")
    add("--out", required=True, metavar="NPZ", help="the file to write")
    add("--clip", default=DEFAULT_CLIP, metavar="NAME", help=f"a folder or a cached name (default {DEFAULT_CLIP})")
    add("--batch-size", "--batch_size", type=int, default=32, help="images at a time")
    add("--device", default="auto", help="auto, cpu, or a device as torch names it")
    given = parser.parse_args(argv)
    if given.batch_size < 1:
        raise UserError(f"--batch-size {given.batch_size}: use 1 or more")
    if Path(given.out).suffix != ".npz":
        raise UserError(f"--out {given.out}: name a file that ends in .npz")
    embedder = ClipEmbedder(given.clip, choose_device(given.device))
    database = embed_images(given.indir, "--indir", embedder, given.batch_size)
    database.save(Path(given.out))
    _log.info("wrote %d embeddings of width %d to %s", *database.embeddings.shape, given.out)


def embed_images(place: str, flag: str, embedder: ClipEmbedder, batch_size: int = 1) -> Database:
    """Embed the readable images below a folder, or one file, which `flag` names. UserError if there are none."""
    sources = list_images(place, flag)
    paths, embeddings = [], []
    with progress(len(sources), "embedding") as bar:
        squares = readable(sources, lambda source: embedder.square(from_bytes(read_image(source.path, channels=3))))
        while batch := list(islice(squares, batch_size)):
            embeddings.append(embedder.embed_squares(torch.stack([square for _, square in batch])).cpu())
            paths += [str(source.path) for source, _ in batch]
            bar.update(len(batch))
    return Database(torch.cat(embeddings), paths)
