"""Draw images from the nearest neighbours of a text or an image (retrieval-augmented diffusion).

    ldm knn2img --run logs/RUN --database databases/mine.npz --prompt "a red circle" --knn 10
    ldm knn2img --run logs/RUN --database databases/mine.npz --image A.png
    ldm knn2img --config 768x768.yaml --ckpt model.ckpt --prompt "a horse" --sampler plms

The context of cross-attention are CLIP embeddings of norm 1: of the neighbours in the database; with --use_neighbors of
the query and then its neighbours, as the original has it; without a database of the query alone. Databases come from
ldm build-retrieval. Without --run, --config and --ckpt the published model is taken, from
models/rdm/rdm768x768/model.ckpt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.cli.build_retrieval import embed_images
from ldm.cli.entry import main_guard
from ldm.cli.inputs import read_prompts
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.published import Published
from ldm.cli.sampling import load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.conditioning.text import EmbeddingConditioner
from ldm.data.readers.embeddings import Database
from ldm.errors import UserError
from ldm.models.image_request import ImageRequest

_DATABASES = Path("data/rdm/retrieval_databases")  # of the published ones, which are given by name
_CLIP_NAMES = {"ViT-L/14": DEFAULT_CLIP}  # as OpenAI's package has it
_DEFAULTS = Defaults("outputs/knn2img", steps=50, guidance=5.0, n_samples=3)
_PUBLISHED = Published(
    "configs/retrieval-augmented-diffusion/768x768.yaml",
    "ldm/retrieval_768.yaml",
    "models/rdm/rdm768x768/model.ckpt",
    "https://ommer-lab.com/files/rdm/model.ckpt",
)
_NEEDED = "retrieval needs an EmbeddingConditioner of CLIP embeddings"
Details = dict[str, Any]


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_iter * n_samples images of every query."""
    given, options = _parser().parse(argv)
    if sum(value is not None for value in (given.prompt, given.from_file, given.image)) != 1:
        raise UserError("no query: give one of --prompt TEXT, --from-file FILE and --image PATH")
    if given.use_neighbors and given.database is None:
        raise UserError("--use_neighbors: there are none without --database")
    options = _PUBLISHED.apply_default(options)
    database = None if given.database is None else _load_database(given.database)
    loaded = load_for_sampling(options)
    conditioner = require_conditioner(loaded, EmbeddingConditioner, _NEEDED)
    embedder = ClipEmbedder(_CLIP_NAMES.get(given.clip, given.clip), loaded.model.device)
    if given.image is not None:
        queries = embed_images(given.image, "--image", embedder)
        contexts, details = queries.embeddings, [{"image": path} for path in queries.paths]
    else:
        prompts = [given.prompt] if given.from_file is None else read_prompts(given.from_file)
        contexts, details = embedder.embed_texts(prompts).cpu(), [{"caption": prompt} for prompt in prompts]
    contexts = contexts[:, None]  # (Q, 1, D)
    if database is not None:
        contexts, details = _with_neighbours(contexts, details, database, given.knn, given.index, given.use_neighbors)
    if contexts.shape[2] != conditioner.dim:
        raise UserError(f"--clip {given.clip}: gives {contexts.shape[2]} numbers; this model reads {conditioner.dim}")
    conditioner.num_tokens = contexts.shape[1]  # 'no condition' is zeros of the shape of the context
    size, count = loaded.size(options.size), given.n_iter * given.n_samples
    requests = (
        ImageRequest(size, {conditioner.key: context}, detail)
        for context, detail in zip(contexts, details, strict=True)
    )
    sample_into_folder(loaded, requests, len(contexts), options, count, max(1, given.n_rows or given.n_samples))


def _parser() -> SamplingParser:
    parser = SamplingParser("knn2img", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--from-file", metavar="FILE", help="one prompt per line, instead of --prompt")
    add("--image", metavar="PATH", help="an image or a folder of them, instead of --prompt")
    database = "condition on neighbours out of this: a file, or folder of files, that build-retrieval wrote"
    add("--database", metavar="NPZ", help=f"{database} (the original looks for them with --use_neighbors only)")
    add("--knn", type=int, default=10, help="how many neighbours (default 10)")
    add("--use_neighbors", action="store_true", help="the query itself too, before its neighbours; as the original")
    add("--index", choices=("exact", "faiss"), default="exact", help="how neighbours are found")
    add("--clip", "--clip_type", default=DEFAULT_CLIP, help=f"CLIP, a folder or a cached name (default {DEFAULT_CLIP})")
    add("--n_rows", type=int, default=0, help="images in a row of the grid (default n_samples)")
    add("--n_repeat", type=int, default=1, help=argparse.SUPPRESS)  # known to the original, without effect there too
    add("--n_iter", type=int, default=1, help="how often n_samples are drawn of each query")
    return parser


def _load_database(name: str) -> Database:
    """Read a file, a folder, or a published database by its name."""
    published = _DATABASES / name
    return Database.load(published if not Path(name).exists() and published.is_dir() else name)


def _with_neighbours(
    queries: Tensor, details: list[Details], database: Database, count: int, index: str, keep_queries: bool
) -> tuple[Tensor, list[Details]]:
    """Return the neighbours of queries (Q, 1, D) as contexts (Q, tokens, D), and note them in the details."""
    indices, similarities = database.nearest(queries[:, 0], count, index)
    neighbours = database.embeddings[indices]  # (Q, K, D)
    noted = []
    for detail, row, values in zip(details, indices.tolist(), similarities.tolist(), strict=True):
        found = [{"path": database.paths[i], "similarity": round(v, 4)} for i, v in zip(row, values, strict=True)]
        noted.append({**detail, "neighbours": found})
    return torch.cat([queries, neighbours], dim=1) if keep_queries else neighbours, noted
