"""Embed the pictures of a folder with CLIP: the database from which retrieval-augmented models are conditioned.

    python scripts/build_retrieval.py --indir PICTURES --out databases/mine.npz

CLIP is read from a local folder or the Hugging Face cache (--clip); nothing is downloaded.
"""

import argparse
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from ldm.cli.common import choose_device, main_guard, progress
from ldm.cli.inputs import list_images, read_image, readable
from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.embeddings import Database
from ldm.errors import UserError

_log = logging.getLogger("ldm.retrieval")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the database of a folder."""
    options = parse(argv)
    sources = list_images(options.indir, "--indir")
    embedder = ClipEmbedder(options.clip, choose_device(options.device))
    paths, embeddings = [], []
    with progress(len(sources), "embedding") as bar:
        squares = readable(sources, lambda source: embedder.square(from_bytes(read_image(source.path, channels=3))))
        while batch := list(islice(squares, options.batch_size)):
            embeddings.append(embedder.embed_squares(torch.stack([square for _, square in batch])).cpu())
            paths += [str(source.path) for source, _ in batch]
            bar.update(len(batch))
    Database(torch.cat(embeddings), paths).save(Path(options.out))
    _log.info("wrote %d embeddings of width %d to %s", len(paths), embeddings[0].shape[1], options.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--indir", required=True, metavar="PATH", help="a folder of pictures, at any depth")
    add("--out", required=True, metavar="NPZ", help="the file to write")
    add("--clip", default=DEFAULT_CLIP, metavar="NAME", help=f"a folder or a cached name (default {DEFAULT_CLIP})")
    add("--batch-size", "--batch_size", type=int, default=32, help="pictures at a time")
    add("--device", default="auto", help="auto, cpu, or a device as torch names it")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: use 1 or more")
    if Path(options.out).suffix != ".npz":
        raise UserError(f"--out {options.out}: name a file that ends in .npz")
    return options


if __name__ == "__main__":
    main()
