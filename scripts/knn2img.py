"""Draw pictures from the nearest neighbours of a text or a picture (retrieval-augmented diffusion).

    python scripts/knn2img.py --run logs/RUN --database databases/mine.npz --prompt "a red circle" --knn 10
    python scripts/knn2img.py --run logs/RUN --database databases/mine.npz --image A.png
    python scripts/knn2img.py --config 768x768.yaml --ckpt model.ckpt --prompt "a horse" --sampler plms

The context of cross-attention are CLIP embeddings of norm 1: of the neighbours in the database; with --use_neighbors of
the query and then its neighbours, as the original has it; without a database of the query alone. Databases come from
scripts/build_retrieval.py. Without --run, --config and --ckpt the published model is taken, from
models/rdm/rdm768x768/model.ckpt.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.cli.common import add_task_arguments, main_guard
from ldm.cli.inputs import list_images, read_image, read_prompts, readable
from ldm.cli.published import Published
from ldm.cli.sampling import Drawing, draw_all, load_for_sampling, only_conditioner, picture_size
from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.conditioning.text import EmbeddingConditioner
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.embeddings import Database
from ldm.errors import UserError

_DATABASES = Path("data/rdm/retrieval_databases")  # of the published ones, which are given by name
_CLIP_NAMES = {"ViT-L/14": DEFAULT_CLIP}  # as OpenAI's package has it
_PUBLISHED = Published(
    "configs/retrieval-augmented-diffusion/768x768.yaml",
    "ldm/retrieval_768.yaml",
    "models/rdm/rdm768x768/model.ckpt",
    "https://ommer-lab.com/files/rdm/model.ckpt",
)
_NEEDED = "retrieval needs an EmbeddingConditioner of CLIP embeddings"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_iter * n_samples pictures of every query."""
    options = parse(argv)
    database = None if options.database is None else load_database(options.database)
    loaded, sampler = load_for_sampling(options)
    conditioner = only_conditioner(loaded, EmbeddingConditioner, _NEEDED)
    queries, details = embed(options, ClipEmbedder(options.clip, loaded.model.device))
    contexts, details = contexts_of(queries, details, database, options)
    if contexts.shape[2] != conditioner.dim:
        raise UserError(f"--clip {options.clip}: gives {contexts.shape[2]} numbers; this model reads {conditioner.dim}")
    conditioner.num_tokens = contexts.shape[1]  # 'none' is zeros of the shape of the context
    count = options.n_iter * options.n_samples
    drawings = describe(contexts, details, conditioner.key, picture_size(loaded, options), count)
    draw_all(loaded, sampler, options, drawings, len(contexts) * count)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--from-file", metavar="FILE", help="one prompt per line, instead of --prompt")
    add("--image", metavar="PATH", help="a picture or a folder of them, instead of --prompt")
    database = "condition on neighbours out of this: a file, or folder of files, that build_retrieval.py wrote"
    add("--database", metavar="NPZ", help=f"{database} (the original looks for them with --use_neighbors only)")
    add("--knn", type=int, default=10, help="how many neighbours (default 10)")
    add("--use_neighbors", action="store_true", help="the query itself too, before its neighbours; as the original")
    add("--index", choices=("exact", "faiss"), default="exact", help="how neighbours are found")
    add("--clip", "--clip_type", default=DEFAULT_CLIP, help=f"CLIP, a folder or a cached name (default {DEFAULT_CLIP})")
    add("--n_rows", type=int, default=0, help="pictures in a row of the grid (default n_samples)")
    add("--n_repeat", type=int, default=1, help=argparse.SUPPRESS)  # known to the original, without effect there too
    add("--n_iter", type=int, default=1, help="how often n_samples are drawn of each query")
    add_task_arguments(parser, "outputs/knn2img", steps=50, scale=5.0, n_samples=3)
    options = parser.parse_args(argv)
    options.columns = max(1, options.n_rows or options.n_samples)
    options.clip = _CLIP_NAMES.get(options.clip, options.clip)
    if sum(value is not None for value in (options.prompt, options.from_file, options.image)) != 1:
        raise UserError("no query: give one of --prompt TEXT, --from-file FILE and --image PATH")
    if options.use_neighbors and options.database is None:
        raise UserError("--use_neighbors: there are none without --database")
    _PUBLISHED.stand_in(options)
    return options


def load_database(name: str) -> Database:
    """Read a file, a folder, or a published database by its name."""
    published = _DATABASES / name
    return Database.load(published if not Path(name).exists() and published.is_dir() else name)


def embed(options: argparse.Namespace, embedder: ClipEmbedder) -> tuple[Tensor, list[dict[str, Any]]]:
    """Embed the queries, (Q, D), and say what each is."""
    if options.image is None:
        prompts = [options.prompt] if options.from_file is None else read_prompts(options.from_file)
        return embedder.embed_texts(prompts).cpu(), [{"caption": prompt} for prompt in prompts]
    sources = list_images(options.image, "--image")
    read = list(readable(sources, lambda source: embedder.square(from_bytes(read_image(source.path, channels=3)))))
    embedded = torch.cat([embedder.embed_squares(square[None]) for _, square in read])
    return embedded.cpu(), [{"image": str(source.path)} for source, _ in read]


def contexts_of(
    queries: Tensor, details: list[dict[str, Any]], database: Database | None, options: argparse.Namespace
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the context of each query, (Q, tokens, D), and note the neighbours in its details."""
    if database is None:
        return queries[:, None], details
    indices, similarities = database.nearest(queries, options.knn, options.index)
    neighbours = database.embeddings[indices]  # (Q, K, D)
    contexts = torch.cat([queries[:, None], neighbours], dim=1) if options.use_neighbors else neighbours
    noted = []
    for detail, row, values in zip(details, indices.tolist(), similarities.tolist(), strict=True):
        found = [{"path": database.paths[i], "similarity": round(v, 4)} for i, v in zip(row, values, strict=True)]
        noted.append({**detail, "neighbours": found})
    return contexts, noted


def describe(
    contexts: Tensor, details: list[dict[str, Any]], key: str, size: tuple[int, int], count: int
) -> Iterator[Drawing]:
    """Describe `count` drawings of each context."""
    for context, detail in zip(contexts, details, strict=True):
        for _ in range(count):
            yield Drawing(size, {key: context}, detail)


if __name__ == "__main__":
    main()
