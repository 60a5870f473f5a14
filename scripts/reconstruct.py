"""Encode and decode pictures with a first stage, and measure what is lost: PSNR, SSIM, and LPIPS with its weights.

    python scripts/reconstruct.py --run logs/RUN --indir PICTURES --outdir outputs/reconstruct
    python scripts/reconstruct.py --config kl-f8/config.yaml --ckpt kl-f8/model.ckpt --indir PICTURES --H 256 --W 256

--run may also be a latent diffusion model, of which the first stage is taken. Latents are without noise. OUTDIR gets
the reconstructions, a grid with picture and reconstruction side by side, and metrics.json.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.common import (
    AS_TRAINED,
    add_device_arguments,
    add_model_arguments,
    add_picture_arguments,
    autocast,
    choose_device,
    main_guard,
    model_source,
    progress,
)
from ldm.cli.inputs import Source, cropped, list_images, padded, read_image, readable
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.errors import UserError
from ldm.evaluation.image_metrics import MIN_SSIM_SIDE, psnr, ssim
from ldm.images import GRID_LIMIT, ImageWriter
from ldm.models.autoencoder import Autoencoder
from ldm.models.loading import load_first_stage
from ldm.models.tiled import TiledAutoencoder
from ldm.networks.perceptual import LPIPS, MIN_SIZE

_log = logging.getLogger("ldm.reconstruct")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Reconstruct every picture, one at a time."""
    options = parse(argv)
    sources = list_images(options.indir, "--indir")
    device = choose_device(options.device)
    loaded = load_first_stage(model_source(options), device)
    model = with_tiles(loaded.autoencoder, options.tile)
    channels, lpips = loaded.autoencoder.architecture.in_channels, perceptual(device)
    target, folder = (options.H, options.W), None

    def read(source: Source) -> Tensor:
        return read_image(source.path, channels, target, loaded.value_range)

    with progress(len(sources), "reconstructing") as bar:
        for source, image in readable(sources, read):
            folder = folder or ImageWriter(options.outdir, grid_limit=0 if options.skip_grid else GRID_LIMIT)
            x = from_bytes(image)[None].to(device)  # (1, C, H, W)
            with torch.no_grad(), autocast(options.precision, device):
                rebuilt = cropped(model.decode(model.encode_mode(padded(x, model.factor))), x.shape[2:]).float()
            shown = to_bytes(rebuilt)  # (1, C, H, W)
            details = {"image": str(source.path), **figures(from_bytes(shown), x, lpips)}
            folder.add(shown[0].cpu(), details, source.name, source=image)
            bar.update()
    record = folder.finish(loaded.provenance())
    summary = write_means(Path(options.outdir) / "metrics.json", folder.entries, str(loaded.checkpoint))
    means = ", ".join(f"{name} {value:.4f}" for name, value in summary["mean"].items())
    _log.info("%d pictures: %s; see %s and metrics.json", len(folder.entries), means, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indir", required=True, metavar="PATH", help="a picture, or a folder of them")
    parser.add_argument("--outdir", default="outputs/reconstruct", help="where pictures and figures go")
    add_model_arguments(parser)
    add_picture_arguments(parser)
    add_device_arguments(parser)
    return parser.parse_args(argv)


def with_tiles(autoencoder: Autoencoder, side: int | None) -> Autoencoder | TiledAutoencoder:
    """Cut the work into tiles of `side` pixels if that is asked for."""
    if side is None:
        return autoencoder
    side = autoencoder.architecture.resolution if side == AS_TRAINED else side
    if side < autoencoder.factor or side % autoencoder.factor:
        raise UserError(f"--tile {side}: the side must be a multiple of {autoencoder.factor} pixels")
    return TiledAutoencoder(autoencoder, side // autoencoder.factor)


def perceptual(device: torch.device) -> LPIPS | None:
    """Return LPIPS if its weights are on this machine."""
    metric, probe = LPIPS().to(device), torch.zeros(1, 3, MIN_SIZE, MIN_SIZE, device=device)
    try:
        metric(probe, probe)
    except UserError as error:
        _log.warning("LPIPS is left out: %s", error)
        return None
    return metric


def figures(rebuilt: Tensor, x: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    """Measure a reconstruction (1, C, H, W) as far as its size allows."""
    measured = {"psnr": psnr(rebuilt, x).item()}
    if min(x.shape[2:]) >= MIN_SSIM_SIDE:
        measured["ssim"] = ssim(rebuilt, x).item()
    if lpips is not None and min(x.shape[2:]) >= MIN_SIZE:
        with torch.no_grad():
            measured["lpips"] = lpips(rebuilt.clamp(-1, 1), x).item()
    return measured


def write_means(path: Path, entries: Sequence[dict], model: str) -> dict:
    """Write the figures of each picture and their means. Returns what was written."""
    names = [name for name in ("psnr", "ssim", "lpips") if any(name in entry for entry in entries)]
    columns = {name: [entry[name] for entry in entries if name in entry] for name in names}
    means = {name: sum(column) / len(column) for name, column in columns.items()}
    content = {"model": model, "num_pictures": len(entries), "mean": means, "pictures": entries}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


if __name__ == "__main__":
    main()
