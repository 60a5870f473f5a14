"""Whether a first stage is good enough for some images: what it loses of which frequencies, how its latents are.

Latents are measured as a diffusion model gets them (a sample for KL, z before quantisation for VQ); reconstructions are
those of the latents without noise, as bytes. Published figures are those in the shipped configs (Table 8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.autoencoder.regularizers import VectorQuantizer
from ldm.config import shipped
from ldm.config.check import check_value
from ldm.config.files import config_of_run
from ldm.data.core.module import errors_of
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.readers.folders import ImageFolder
from ldm.doctor.finding import Finding, saved
from ldm.doctor.spectrum import BANDS, kept_up_to, radial_power
from ldm.errors import UserError
from ldm.evaluation.image_metrics import available_metrics
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.report import Panel, plot_panels
from ldm.images import image_grid, to_pil, to_rgb_bytes
from ldm.models.autoencoder import Autoencoder
from ldm.models.latent_scale import scale_and_moments
from ldm.models.loading import LoadedFirstStage, ModelSource, train_option

__all__ = ["Figures", "examine_first_stage", "images_for", "measure", "published", "released"]

Progress = Callable[[int, str], AbstractContextManager[Any]]  # of a number of images and a title; has `update(n)`
RELEASED = Path("models/first_stage_models")  # where the shipped configs look for them
_PUBLISHED = re.compile(r"First stage (?P<kind>f=.*?):.*rFID (?P<rfid>[\d.]+), PSNR (?P<psnr>[\d.]+)")
_SHOWN, _NARROW, _SLACK = 8, 0.05, 1.0  # images; deviation of a channel against the widest; dB
_SEED = 0


class Published(NamedTuple):
    """What a paper says of a first stage, on ImageNet's validation set."""

    name: str
    rfid: float
    psnr: float


@dataclass(frozen=True)
class Figures:
    """What was measured of a first stage.

    Args:
        kind: as the shipped configs say it, such as "f=8, KL, 4 channels".
        metrics: mean and deviation over the images, by name.
        original, rebuilt: power in each of the bands of `radial_power`, averaged over the images.
        mean, std: of each channel of the latents.
        scale: 1 / deviation over all of them, which brings them to unit variance.
        sheet: some images above their reconstructions, bytes (3, H, W).
    """

    kind: str
    metrics: Mapping[str, tuple[float, float]]
    original: Sequence[float]
    rebuilt: Sequence[float]
    mean: Sequence[float]
    std: Sequence[float]
    scale: float
    sheet: Tensor

    def row(self) -> list[str]:
        """Return what the comparison of several shows."""
        values = [f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in self.metrics.values()]
        return [self.kind, *values, f"{kept_up_to(self.original, self.rebuilt):.3g}", f"{self.scale:.4g}"]


@torch.no_grad()
def measure(
    autoencoder: Autoencoder,
    images: ImageSet,
    batch_size: int = 8,
    on_images: Callable[[int], Any] = lambda count: None,
) -> Figures:
    """Encode and decode all images of a set, and return what is measured of it. UserError for what is not finite."""
    device = next(autoencoder.parameters()).device
    metrics, scores = available_metrics(device), dict[str, list[Tensor]]()
    noise = torch.Generator().manual_seed(_SEED)
    power, sheet = torch.zeros(2, BANDS, dtype=torch.float64), []

    def latents() -> Iterator[Tensor]:
        for start in range(0, len(images), batch_size):
            positions = range(start, min(start + batch_size, len(images)))
            x = from_bytes(to_bytes(images.batch(positions)["image"])).to(device)  # (B, C, H, W)
            rebuilt = autoencoder.decode(autoencoder.encode_mode(x))
            if not torch.isfinite(rebuilt).all():
                raise UserError("the reconstructions are not finite numbers; check the weights")
            rebuilt = from_bytes(to_bytes(rebuilt))
            for name, (least, metric) in metrics.items():
                if min(x.shape[-2:]) >= least:
                    scores.setdefault(name, []).append(metric(rebuilt, x).flatten().cpu())
            for row, part in enumerate((x, rebuilt)):
                power[row] += radial_power(part).sum(0)
            if start == 0:
                sheet.append(torch.cat([to_rgb_bytes(part[:_SHOWN]) for part in (x, rebuilt)]))
            yield autoencoder.encode(x, lambda shape: torch.randn(shape, generator=noise).to(device))
            on_images(len(positions))

    scale, mean, std = scale_and_moments(latents())
    columns = {name: torch.cat(parts).double() for name, parts in scores.items()}
    values = {name: (column.mean().item(), column.std(correction=0).item()) for name, column in columns.items()}
    original, rebuilt = (power / len(images)).tolist()
    grid = image_grid(sheet[0], min(_SHOWN, len(images), batch_size))
    moments = (part.flatten().tolist() for part in (mean, std))
    return Figures(_kind(autoencoder), values, original, rebuilt, *moments, scale.item(), grid)


def examine_first_stage(
    stages: Mapping[str, Autoencoder], images: ImageSet, outdir: Path, progress: Progress, draws: bool = False
) -> Iterator[Finding]:
    """Yield what the first of some stages does to images, in comparison with the others and with published ones.

    Writes OUTDIR/first_stage.png, images above their reconstructions, and if `draws` OUTDIR/spectrum.png. Raises
    UserError where nothing can be measured or written.
    """
    found = {}
    for name, autoencoder in stages.items():
        with progress(len(images), name) as bar:
            found[name] = measure(autoencoder, images, on_images=bar.update)
    own = next(iter(found.values()))
    header = ["first stage", "kind", *own.metrics, "kept up to", "scale"]
    rows = [[name, *figures.row()] for name, figures in found.items()]
    sheet = saved(to_pil(own.sheet), outdir / "first_stage.png")
    lines = ["PSNR in dB; kept up to: cycles a pixel below which half of the power is kept, at most 0.5"]
    errors = errors_of(images.dataset)
    if errors is not None and errors.num_unreadable:
        lines.append(f"{errors.num_unreadable:,} files cannot be read, others took their place; see the messages")
    yield Finding(f"Reconstructions of {len(images)} images", lines=lines, table=[header, *rows], images=[sheet])
    yield Finding("Good enough?", lines=_verdict(own))
    yield _spectrum(found, outdir if draws else None)
    yield _latents(own)


def images_for(
    loaded: LoadedFirstStage, folder: str, limit: int | None, size: tuple[int | None, int | None]
) -> ImageSet:
    """Return images of a folder (at most `limit`) as a stage takes them, in a size, by default that of its training.

    Files that cannot be read are replaced. Raises UserError for a folder without images and for impossible sizes.
    """
    stage = loaded.autoencoder
    trained = train_option(loaded.content, "size") or stage.architecture.resolution
    check_value(trained, int | tuple[int, int], "data.params.train.params.size")
    sides = (trained, trained) if isinstance(trained, int) else trained
    height, width = (asked or side for asked, side in zip(size, sides, strict=True))
    stage.latent_shape(height, width)
    images = ImageFolder(folder, [height, width], channels=stage.in_channels, value_range=loaded.value_range)
    return ImageSet(images, folder, limit, replaces=True)


def published(kind: str) -> list[Published]:
    """Return what the shipped configs say of published first stages whose kind begins with a text, such as "f=8"."""
    titles = {
        name: _PUBLISHED.match(shipped.title(name)) for name in shipped.names() if name.startswith("autoencoder/")
    }
    known = {name: found for name, found in titles.items() if found and f"{found['kind']}, ".startswith(f"{kind}, ")}
    return [Published(name, float(found["rfid"]), float(found["psnr"])) for name, found in known.items()]


def released(folder: Path = RELEASED) -> dict[str, ModelSource]:
    """Return the released first stages that are on this machine, by name; their config may be the shipped one."""
    found = {}
    for file in sorted(folder.glob("*/model.ckpt")):
        name = file.parent.name
        own = shipped.find(f"autoencoder/{name.replace('-', '_')}")
        if config_of_run(file.parent) is not None:
            found[name] = ModelSource(file.parent)
        elif Path(own).is_file():
            found[name] = ModelSource(config=own, checkpoint=file)
    return found


def _kind(autoencoder: Autoencoder) -> str:
    """Describe an autoencoder as the shipped configs do."""
    codes = autoencoder.quantize.n_e if isinstance(autoencoder.quantize, VectorQuantizer) else None
    name = "KL" if autoencoder.quantize.double_z else "no regulariser" if codes is None else f"VQ ({codes} codes)"
    return f"f={autoencoder.factor}, {name}, {autoencoder.latent_channels} channels"


def _verdict(figures: Figures) -> list[str]:
    """Say how the images fare in comparison with what published first stages do to ImageNet."""
    psnr, deviation = figures.metrics["psnr"]
    same, factor = published(figures.kind), figures.kind.partition(",")[0]
    lines = [
        f"published {name}: PSNR {value:g}, rFID {rfid:g} on ImageNet"
        for name, rfid, value in same or published(factor)
    ]
    if not same:
        return [*lines, f"none of exactly this kind ({figures.kind}) was published; those above have the same {factor}"]
    least = min(value for _, _, value in same)
    if psnr >= least - _SLACK:
        verdict = "yes, by this measure: your images lose no more than ImageNet's do with the published one"
    else:
        verdict = "no, by this measure: fine-tune it on your images, or train one (configs/own/autoencoder.yaml)"
    return [*lines, f"yours: PSNR {psnr:.4g} ± {deviation:.2g}; {verdict}; look at the sheet, too"]


def _spectrum(found: Mapping[str, Figures], outdir: Path | None) -> Finding:
    """Return how much of the power of each band is left, in dB, and draw the curves if a folder is given."""
    width = 0.5 / BANDS
    header = ["cycles a pixel", *found]
    rows = []
    for band in range(BANDS):
        pairs = [(figures.original[band], figures.rebuilt[band]) for figures in found.values()]
        if all(before > 0 for before, _ in pairs):
            rows.append([f"{band * width:.3f} to {(band + 1) * width:.3f}", *(_decibels(*pair) for pair in pairs)])
    lines = ["power of the reconstructions against the images; -3 dB is half of it"]
    if outdir is None:
        return Finding("Spectrum", lines=lines, table=[header, *rows])
    curves = {"images": next(iter(found.values())).original, **{name: part.rebuilt for name, part in found.items()}}
    middles = [(band + 0.5) * width for band in range(BANDS)]
    points = {
        name: [pair for pair in zip(middles, curve, strict=True) if pair[1] > 0] for name, curve in curves.items()
    }
    plot_panels([Panel("cycles a pixel", "power", points)], outdir / "spectrum.png")
    return Finding("Spectrum", lines=lines, table=[header, *rows], images=[outdir / "spectrum.png"])


def _decibels(before: float, after: float) -> str:
    return f"{10 * torch.tensor(max(after, 1e-12) / before).log10().item():+.1f} dB"


def _latents(figures: Figures) -> Finding:
    """Return mean and deviation of the channels, the scale that they suggest, and channels that say next to nothing."""
    widest = max(figures.std)
    rows = [
        [str(number), f"{mean:+.3f}", f"{std:.3f}"]
        for number, (mean, std) in enumerate(zip(figures.mean, figures.std, strict=True))
    ]
    lines = [f"scale of unit variance: {figures.scale:.5g}; in YAML latent_scale: {figures.scale:.5g}, or measure"]
    if min(figures.std) < widest / 2:
        lines.append("they differ by more than a factor of 2: latent_scale: {value: measure, per_channel: true}")
    narrow = [str(number) for number, std in enumerate(figures.std) if std < _NARROW * widest]
    problems = [f"the channels {', '.join(narrow)} hardly vary: they carry next to nothing"] if narrow else []
    return Finding("Latents", lines=lines, table=[["channel", "mean", "std"], *rows], problems=problems)
