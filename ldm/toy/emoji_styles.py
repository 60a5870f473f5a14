"""The judge of text to image on emoji in five styles: which unseen pairs of a concept and a style are drawn?

OUT/judged.json      shares right, those of the real images themselves, and how it was sampled
OUT/pairs.png        each sample, with the real image on its right
OUT/neighbours.png   real images, the samples below them, and the training images nearest to these
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.errors import UserError
from ldm.evaluation.composition import Gallery, Label, shares_right
from ldm.evaluation.extractors import Extractor
from ldm.evaluation.image_sets import ImageSet, split_images
from ldm.images import image_grid, to_pil
from ldm.models.autoencoder import Autoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import read_config
from ldm.toy.runs import Progress, Sampling, sample_all
from ldm.writing import write_text

_PART, _PAIRS_IN_A_ROW, _NEIGHBOURS = 256, 12, 24
_KEYS = ("caption", "concept", "style")


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs that are asked for, and all real images to find the samples among: of training, and held out."""

    asked: ImageSet
    train: ImageSet
    held_out: ImageSet

    @classmethod
    def of_run(cls, run: Path, limit: int | None = None, overrides: Sequence[str] = ()) -> Pairs:
        """Take those of a run's data with `data.key=value`; of the pairs so many, evenly spaced."""
        content = resolve(apply_overrides(read_config(run), overrides), throw_on_missing=False)
        asked, held_out = split_images(content, "validation", limit), split_images(content, "validation")
        return cls(asked, split_images(content, "train", replaces=True), held_out)


def judge(
    model: LatentDiffusion, pairs: Pairs, out: Path, sampling: Sampling, extractor: Extractor, progress: Progress
) -> dict[str, Any]:
    """Sample the pairs and hold them against all real images; write OUT, and return judged.json."""
    batch = _checked(pairs.asked, range(len(pairs.asked)))
    real, labels = to_bytes(batch["image"]), list(map(Label, batch["concept"], batch["style"]))
    samples = to_bytes(sample_all(model, {"caption": batch["caption"]}, real.shape[-2:], sampling, progress))
    with progress(len(pairs.train) + len(pairs.held_out), "real images") as bar:
        train, held_out = (_gallery(images, extractor, bar) for images in (pairs.train, pairs.held_out))
    gallery = Gallery(torch.cat([train.features, held_out.features]), [*train.labels, *held_out.labels])
    drawn, rebuilt = (extractor(images).pooled for images in (samples, _rebuilt(model.first_stage_model, real)))
    ranks, (distances, nearest) = gallery.ranks(drawn, labels), train.nearest(drawn)
    of_real = train.nearest(extractor(real).pooled)[0]
    styles = sorted({label.style for label in labels})
    content = {
        "right": shares_right(ranks),
        "right by style": {name: shares_right(ranks[[style == name for _, style in labels]]) for name in styles},
        "real images through the first stage": shares_right(gallery.ranks(rebuilt, labels)),
        "real images of one style as another, right at 1": gallery.between_styles(),
        "distance to the training set over that of real ones": (distances.median() / of_real.median()).item(),
        "pairs": len(labels),
        "real images": len(gallery.labels),
        "features": extractor.name,
        "sampling": asdict(sampling),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "judged.json", json.dumps(content, indent=2) + "\n")
    beside = torch.stack([samples, real], dim=1).flatten(0, 1)  # (2 N, 3, H, W)
    to_pil(image_grid(beside, 2 * _PAIRS_IN_A_ROW)).save(out / "pairs.png")
    found = to_bytes(pairs.train.batch(nearest[:_NEIGHBOURS].tolist())["image"])
    to_pil(image_grid(torch.cat([real[:_NEIGHBOURS], samples[:_NEIGHBOURS], found]), len(found))).save(
        out / "neighbours.png"
    )
    return content


def _checked(images: ImageSet, positions: range) -> dict[str, Any]:
    """Return a batch. UserError unless it says what its images show."""
    batch = images.batch(positions)
    if missing := [key for key in _KEYS if key not in batch]:
        raise UserError(
            f"{images.name}: items have no {', '.join(missing)}; set its fields as demo/txt2img_emoji_styles does"
        )
    return batch


def _gallery(images: ImageSet, extractor: Extractor, bar: Any) -> Gallery:
    """Describe all images of a set."""
    features, labels = [], []
    for first in range(0, len(images), _PART):
        batch = _checked(images, range(first, min(first + _PART, len(images))))
        features.append(extractor(to_bytes(batch["image"])).pooled)
        labels += map(Label, batch["concept"], batch["style"])
        bar.update(len(batch["image"]))
    return Gallery(torch.cat(features), labels)


@torch.no_grad()
def _rebuilt(stage: Autoencoder, images: Tensor) -> Tensor:
    """Encode bytes (N, 3, H, W) and decode them: what perfect samples of the latents would be."""
    device = next(stage.parameters()).device
    parts = [stage.decode(stage.encode_mode(from_bytes(part).to(device))) for part in images.split(_PART)]
    return to_bytes(torch.cat(parts)).cpu()
