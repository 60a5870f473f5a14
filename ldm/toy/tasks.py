"""What each conditional task promises, as figures: one table for the toy twins of the paper's tasks.

Every measure takes pictures (B, 3, H, W) in [-1, 1] and a batch of B items, and gives one value per picture, so that
the same pictures can be held against their own conditions and against those of others ("shuffled"): a measure that
cannot tell these apart shows nothing.
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

from ldm.models.back_projection import back_project
from ldm.toy import agreement
from ldm.toy.scene_detector import caption_is_drawn
from ldm.toy.shapes import PALETTE
from ldm.toy.thumbnails import thumbnail_embeddings

Batch = Mapping[str, Any]
Measure = Callable[[Tensor, Batch], Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """Say what a toy model is conditioned on, and how its pictures are judged.

    config: a name below configs/demo; keys: what the model is given of a batch; scale: of classifier-free guidance;
    measures: judged with right and with shuffled conditions; references: what is reached without the model;
    keeps_known: pixels outside the hole (`mask` > 0) are those of the given picture.
    """

    title: str
    config: str
    keys: tuple[str, ...]
    measures: Mapping[str, Measure]
    references: Mapping[str, Callable[[Batch], Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    keeps_known: bool = False

    def finished(self, images: Tensor, batch: Batch) -> Tensor:
        """Put what is known of the pictures back into them."""
        if not self.keeps_known:
            return images
        return torch.where(batch["mask"] > 0, images, batch["image"])

    def figures(self, images: Tensor, batch: Batch) -> dict[str, Figures]:
        """Judge finished pictures: name -> mean with the right and the shuffled conditions, or of the reference."""
        others = shuffled(batch)
        table = {}
        for name, measure in self.measures.items():
            right, wrong = (measure(images, part).float().mean().item() for part in (batch, others))
            table[name] = {"right": right, "shuffled": wrong}
        for name, reference in self.references.items():
            table[name] = {"reference": reference(batch).float().mean().item()}
        return table


def shuffled(batch: Batch) -> dict[str, Any]:
    """Return every item the entries of the one half a batch away."""
    size = len(next(iter(batch.values())))
    order = torch.arange(size).roll(size // 2)
    return {
        key: value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]
        for key, value in batch.items()
    }


def captions_drawn(images: Tensor, batch: Batch) -> Tensor:
    """Return which pictures show exactly what their captions say, (B,)."""
    return torch.tensor([caption_is_drawn(x, text) for x, text in zip(images, batch["caption"], strict=True)])


def similarity_to_neighbours(images: Tensor, batch: Batch) -> Tensor:
    """Return the mean correlation of each picture's thumbnail with its `neighbours`, (B,)."""
    neighbours = batch["neighbours"]  # (B, K, D)
    side = math.isqrt(neighbours.shape[2] // images.shape[1])
    return torch.einsum("bd,bkd->bk", thumbnail_embeddings(images, side), neighbours).mean(1)


def recognised_by(classifier: nn.Module) -> Measure:
    """Return the measure that tells which pictures a classifier takes for their `class_label`."""

    def measure(images: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            return classifier(images).argmax(1) == batch["class_label"]

    return measure


def scene_tasks() -> dict[str, Task]:
    """List the tasks on generated scenes."""
    return {
        "text": Task(
            "text to image", "txt2img_shapes", ("caption",),
            {"captions drawn right in every part": captions_drawn}, scale=3.0,
        ),
        "layout": Task(
            "layout to image", "layout_shapes", ("boxes", "box_labels"),
            {"IoU of asked and detected boxes": lambda x, b: agreement.layout_iou(x, b["boxes"], b["box_labels"])},
            scale=2.0,
        ),
        "semantic": Task(
            "semantic map to image", "semantic_shapes", ("segmentation",),
            {
                "pixels of the asked class": lambda x, b: agreement.map_agreement(x, b["segmentation"]),
                "IoU of the shapes' pixels": lambda x, b: agreement.map_iou(x, b["segmentation"]),
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
    """Describe class to image on digits, judged by a classifier of its own."""
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
        return agreement.sharpness(images) / agreement.sharpness(batch["image"])

    def held(measure: Measure) -> Measure:
        return lambda images, batch: measure(back_project(images, batch["low_res"]), batch)

    measures: dict[str, Measure] = {
        "PSNR, dB": lambda x, b: agreement.psnr(x, b["image"]),
        "consistency with the small picture, dB": lambda x, b: agreement.psnr(
            agreement.shrunk(x, factor), b["low_res"]
        ),
        "sharpness, 1 is real": relative_sharpness,
    }
    return {
        "superres": Task(
            f"super-resolution x{factor}", "superres_photos", ("low_res",),
            measures | {f"{name}, held to the small picture": held(measure) for name, measure in measures.items()},
            {
                f"{name}, of bicubic enlarging": partial(_of_enlarged, measure, factor)
                for name, measure in measures.items()
            },
        ),
        "inpainting": Task(
            "inpainting", "inpainting_photos", ("masked_image", "mask"),
            {
                "PSNR in the hole, dB": lambda x, b: agreement.psnr(x, b["image"], b["mask"]),
                "largest change of a known pixel": _change_outside,
            },
            {
                "PSNR of a smooth fill, dB": lambda b: agreement.psnr(
                    agreement.smoothly_filled(b["image"], b["mask"]), b["image"], b["mask"]
                ),
            },
            keeps_known=True,
        ),
    }  # fmt: skip


def _of_enlarged(measure: Measure, factor: int, batch: Batch) -> Tensor:
    return measure(agreement.enlarged(batch["low_res"], factor), batch)


def _change_outside(images: Tensor, batch: Batch) -> Tensor:
    return ((images - batch["image"]).abs() * (batch["mask"] <= 0)).amax((1, 2, 3))


def condition_pictures(task: Task, batch: Batch) -> Tensor | None:
    """Draw the conditions as pictures (B, 3, H, W) of the size of the images, None where they are words."""
    size = batch["image"].shape[2:]
    if "segmentation" in task.keys:
        colours = torch.tensor([[0.95, 0.95, 0.95], [0.85, 0.2, 0.2], [0.2, 0.5, 0.9], [0.2, 0.7, 0.3]])
        return colours[batch["segmentation"]].movedim(-1, 1) * 2 - 1
    if "boxes" in task.keys:
        pairs = zip(batch["boxes"].tolist(), batch["box_labels"].tolist(), strict=True)
        return torch.stack([_outlined(boxes, labels, tuple(size)) for boxes, labels in pairs])
    if "neighbours" in task.keys:
        return _nearest_thumbnails(batch["neighbours"], tuple(size))
    if "low_res" in task.keys:
        return F.interpolate(batch["low_res"], size=tuple(size))
    if "masked_image" in task.keys:
        return batch["masked_image"]
    return None


def _nearest_thumbnails(neighbours: Tensor, size: tuple[int, int]) -> Tensor:
    """Show the first neighbour's thumbnail (without its mean colour, on grey) of each picture."""
    side = math.isqrt(neighbours.shape[2] // 3)
    small = neighbours[:, 0].unflatten(1, (3, side, side))  # (B, 3, side, side)
    return F.interpolate(small / small.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6), size=size)


def _outlined(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> Tensor:
    """Outline boxes on white, each in the colour that its label says."""
    canvas, (height, width) = torch.ones(3, *size), size
    for (left, top, box_width, box_height), label in zip(boxes, labels, strict=True):
        if label < 0:
            continue
        x0, y0 = int(left * width), int(top * height)
        x1, y1 = min(int((left + box_width) * width), width - 1), min(int((top + box_height) * height), height - 1)
        colour = torch.tensor(list(PALETTE.values())[label % len(PALETTE)])[:, None] * 2 - 1
        canvas[:, y0 : y1 + 1, [x0, x1]] = colour[..., None]
        canvas[:, [y0, y1], x0 : x1 + 1] = colour[..., None]
    return canvas
