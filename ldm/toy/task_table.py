"""The toy versions of the paper's conditional tasks, each with metrics of how its samples follow their conditions.

A metric takes images (B, 3, H, W) in [-1, 1] and a batch of B items and returns one value an image, so that the same
images can be compared with their own conditions and with those of other items ("shuffled"): a metric with equal values
for both shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.core.pixels import from_bytes
from ldm.evaluation.image_metrics import Batch, psnr, psnr_to_target
from ldm.images import colour_classes, draw_boxes
from ldm.models.back_projection import back_project
from ldm.toy import metrics
from ldm.toy.shapes import PALETTE
from ldm.toy.thumbnails import thumbnail_embeddings

Measure = Callable[[Tensor, Batch], Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What a toy model is conditioned on, and how its samples are measured.

    config: a name below configs/demo; keys: batch entries that the model is conditioned on; scale: of classifier-free
    guidance; measures: computed with right and with shuffled conditions; references: values without the model;
    keeps_known: pixels outside the hole (`mask` > 0) are those of the given image.
    """

    title: str
    config: str
    keys: tuple[str, ...]
    measures: Mapping[str, Measure]
    references: Mapping[str, Callable[[Batch], Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    keeps_known: bool = False

    def finished(self, images: Tensor, batch: Batch) -> Tensor:
        """Return images with their known pixels put back."""
        if not self.keeps_known:
            return images
        return torch.where(batch["mask"] > 0, images, batch["image"])

    def figures(self, images: Tensor, batch: Batch) -> dict[str, Figures]:
        """Measure finished images: name -> mean with the right and the shuffled conditions, or of the reference."""
        others = shuffled(batch)
        table = {}
        for name, measure in self.measures.items():
            right, wrong = (measure(images, part).float().mean().item() for part in (batch, others))
            table[name] = {"right": right, "shuffled": wrong}
        for name, reference in self.references.items():
            table[name] = {"reference": reference(batch).float().mean().item()}
        return table


def shuffled(batch: Batch) -> dict[str, Any]:
    """Return a batch in which each item has the entries of the one half a batch away."""
    size = len(next(iter(batch.values())))
    order = torch.arange(size).roll(size // 2)
    return {
        key: value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]
        for key, value in batch.items()
    }


def similarity_to_neighbours(images: Tensor, batch: Batch) -> Tensor:
    """Return the mean correlation of each image's thumbnail with its `neighbours`, (B,)."""
    neighbours = batch["neighbours"]  # (B, K, D)
    side = math.isqrt(neighbours.shape[2] // images.shape[1])
    return torch.einsum("bd,bkd->bk", thumbnail_embeddings(images, side), neighbours).mean(1)


def recognised_by(classifier: nn.Module) -> Measure:
    """Return the metric of whether a classifier assigns images to their `class_label`."""

    def measure(images: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            return classifier(images).argmax(1) == batch["class_label"]

    return measure


def scene_tasks() -> dict[str, Task]:
    """List the tasks on generated scenes."""
    return {
        "text": Task(
            "text to image", "txt2img_shapes", ("caption",),
            {"captions drawn right in every part": metrics.captions_drawn}, scale=3.0,
        ),
        "layout": Task(
            "layout to image", "layout_shapes", ("boxes", "box_labels"),
            {"IoU of asked and detected boxes": metrics.layout_iou},
            scale=2.0,
        ),
        "semantic": Task(
            "semantic map to image", "semantic_shapes", ("segmentation",),
            {
                "pixels of the asked class": metrics.map_accuracy,
                "IoU of the shapes' pixels": metrics.map_iou,
            },
        ),
        "retrieval": Task(
            "retrieval-augmented", "retrieval_shapes", ("neighbours",),
            {"similarity to the neighbours": similarity_to_neighbours},
            {"similarity of real scenes": lambda batch: similarity_to_neighbours(batch["image"], batch)},
            scale=2.0,
        ),
    }  # fmt: skip


def digit_task(classifier: nn.Module) -> Task:
    """Return class to image on digits, measured by an independent classifier."""
    recognised = recognised_by(classifier)
    return Task(
        "class to image", "class_digits", ("class_label",),
        {"recognised by an independent classifier": recognised},
        {"real digits recognised": lambda batch: recognised(batch["image"], batch)},
        scale=2.0,
    )  # fmt: skip


def photo_tasks(factor: int = 4) -> dict[str, Task]:
    """List the tasks on crops of photos."""

    def relative_sharpness(images: Tensor, batch: Batch) -> Tensor:
        return metrics.sharpness(images) / metrics.sharpness(batch["image"])

    def back_projected(measure: Measure) -> Measure:
        return lambda images, batch: measure(back_project(images, batch["low_res"]), batch)

    measures: dict[str, Measure] = {
        "PSNR, dB": psnr_to_target,
        "consistency with the small image, dB": lambda x, b: psnr(metrics.shrunk(x, factor), b["low_res"]),
        "sharpness, 1 is real": relative_sharpness,
    }
    return {
        "superres": Task(
            f"super-resolution x{factor}", "superres_photos", ("low_res",),
            measures | {f"{name}, back-projected": back_projected(measure) for name, measure in measures.items()},
            {
                f"{name}, of bicubic enlarging": partial(_of_enlarged, measure, factor)
                for name, measure in measures.items()
            },
        ),
        "inpainting": Task(
            "inpainting", "inpainting_photos", ("masked_image", "mask"),
            {
                "PSNR in the hole, dB": lambda x, b: psnr(x, b["image"], b["mask"]),
                "largest change of a known pixel": _change_outside,
            },
            {
                "PSNR of a smooth fill, dB": lambda b: psnr(
                    metrics.smoothly_filled(b["image"], b["mask"]), b["image"], b["mask"]
                ),
            },
            keeps_known=True,
        ),
    }  # fmt: skip


def _of_enlarged(measure: Measure, factor: int, batch: Batch) -> Tensor:
    return measure(metrics.enlarged(batch["low_res"], factor), batch)


def _change_outside(images: Tensor, batch: Batch) -> Tensor:
    return ((images - batch["image"]).abs() * (batch["mask"] <= 0)).amax((1, 2, 3))


def condition_images(task: Task, batch: Batch) -> Tensor | None:
    """Return the conditions as images (B, 3, H, W) of the size of `image`, None for words."""
    size = batch["image"].shape[2:]
    if "segmentation" in task.keys:
        return from_bytes(torch.stack([colour_classes(classes, 4) for classes in batch["segmentation"]]))
    if "boxes" in task.keys:
        pairs = zip(batch["boxes"], batch["box_labels"], strict=True)
        return torch.stack([_outlined(boxes, labels, tuple(size)) for boxes, labels in pairs])
    if "neighbours" in task.keys:
        return _nearest_thumbnails(batch["neighbours"], tuple(size))
    if "low_res" in task.keys:
        return F.interpolate(batch["low_res"], size=tuple(size))
    if "masked_image" in task.keys:
        return batch["masked_image"]
    return None


def _nearest_thumbnails(neighbours: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the first neighbour's thumbnail (without its mean colour, on grey) of each image."""
    side = math.isqrt(neighbours.shape[2] // 3)
    small = neighbours[:, 0].unflatten(1, (3, side, side))  # (B, 3, side, side)
    return F.interpolate(small / small.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6), size=size)


def _outlined(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (N, 4), outlined in the colours that their labels say: (3, H, W) in [-1, 1]."""
    known, palette = labels >= 0, list(PALETTE.values())
    colours = [[round(255 * part) for part in palette[label % len(palette)]] for label in labels[known].tolist()]
    return from_bytes(draw_boxes(boxes[known].tolist(), size, colours=colours))
