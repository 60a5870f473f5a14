"""Encode and decode images with a first stage, and measure what is lost: PSNR, SSIM, and LPIPS with its weights.

    ldm reconstruct --run logs/RUN --indir IMAGES --outdir outputs/reconstruct
    ldm reconstruct --config kl-f8/config.yaml --ckpt kl-f8/model.ckpt --indir IMAGES --H 256 --W 256

--run may also be a latent diffusion model, of which the first stage is taken. Latents are without noise. OUTDIR gets
the reconstructions, a grid with image and reconstruction side by side, and metrics.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import (
    AS_TRAINED,
    PRECISIONS,
    TaskParser,
    add_device_arguments,
    add_image_arguments,
    add_model_arguments,
    choose_device,
    model_source,
    progress,
)
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.readers.single_images import cropped, padded, read_image
from ldm.errors import UserError
from ldm.evaluation.image_metrics import available_metrics
from ldm.images import GRID_LIMIT, ImageWriter
from ldm.models.autoencoder import Autoencoder
from ldm.models.loading import load_first_stage
from ldm.models.tiled import TiledAutoencoder

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Reconstruct every image, one at a time."""
    parser = TaskParser("reconstruct", __doc__)
    parser.add_argument("--indir", required=True, metavar="PATH", help="an image, or a folder of them")
    parser.add_argument("--outdir", default="outputs/reconstruct", help="where images and metrics go")
    add_model_arguments(parser)
    add_image_arguments(parser)
    add_device_arguments(parser)
    given = parser.parse_args(argv)
    sources, device = list_images(given.indir, "--indir"), choose_device(given.device)
    loaded = load_first_stage(model_source(given), device)
    model, metrics, dtype = (
        _tiled(loaded.autoencoder, given.tile),
        available_metrics(device),
        PRECISIONS[given.precision],
    )
    channels, size, folder = loaded.autoencoder.in_channels, (given.H, given.W), None

    def read(source: Source) -> Tensor:
        return read_image(source.path, channels, size, loaded.value_range)

    with progress(len(sources), "reconstructing") as bar:
        for source, image in readable(sources, read):
            folder = folder or ImageWriter(given.outdir, grid_limit=0 if given.skip_grid else GRID_LIMIT)
            x = from_bytes(image)[None].to(device)  # (1, C, H, W)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                rebuilt = cropped(model.decode(model.encode_mode(padded(x, model.factor))), x.shape[2:]).float()
            written = to_bytes(rebuilt)  # (1, C, H, W)
            with torch.no_grad():
                fitting = {name: metric for name, (side, metric) in metrics.items() if min(x.shape[2:]) >= side}
                measured = {name: metric(from_bytes(written), x).item() for name, metric in fitting.items()}
            folder.add(written[0].cpu(), {"image": str(source.path), **measured}, source.name, source=image)
            bar.update()
    record = folder.finish(loaded.provenance())
    means = _write_means(Path(given.outdir) / "metrics.json", metrics, folder.entries, str(loaded.checkpoint))
    text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    _log.info("%d images: %s; see %s and metrics.json", len(folder.entries), text, record)


def _tiled(autoencoder: Autoencoder, side: int | None) -> Autoencoder | TiledAutoencoder:
    """Return the autoencoder, on tiles of `side` pixels if that is asked for."""
    if side is None:
        return autoencoder
    side = autoencoder.architecture.resolution if side == AS_TRAINED else side
    if side < autoencoder.factor or side % autoencoder.factor:
        raise UserError(f"--tile {side}: the side must be a multiple of {autoencoder.factor} pixels")
    return TiledAutoencoder(autoencoder, side // autoencoder.factor)


def _write_means(path: Path, names: Iterable[str], entries: Sequence[dict[str, Any]], model: str) -> dict[str, float]:
    """Write the metrics of each image and their means; return the means."""
    columns = {name: [entry[name] for entry in entries if name in entry] for name in names}
    means = {name: sum(column) / len(column) for name, column in columns.items() if column}
    content = {"model": model, "num_images": len(entries), "mean": means, "images": entries}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return means
