"""Metrics of how images (B, 3, H, W) in [-1, 1] follow their conditions: captions, boxes, maps of shapes, holes.

Metrics of images and their batch return one value an image, (B,); named on a command line they can be measured of any
samples (`ldm.toy.names`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.image_pairs import super_resolution
from ldm.data.layout.boxes import Box
from ldm.evaluation.image_metrics import Batch
from ldm.toy.captions import COLOURS, SHAPES
from ldm.toy.scene_detector import caption_is_drawn, detect, segment


def captions_drawn(images: Tensor, batch: Batch) -> Tensor:
    """Return whether each image shows exactly what its `caption` says, bool (B,)."""
    return torch.tensor([caption_is_drawn(x, text) for x, text in zip(images, batch["caption"], strict=True)])


def layout_iou(images: Tensor, batch: Batch) -> Tensor:
    """Return the mean intersection over union of the wanted boxes with the detected objects of the same kind, (B,).

    Of the batch: `boxes` (B, N, 4) left, top, width, height in [0, 1]; `box_labels` (B, N) as `Shapes` numbers shape
    and colour, -1 for no box. A box without an object counts 0; an object counts for one box at most.
    """
    cases = zip(images, batch["boxes"], batch["box_labels"], strict=True)
    return torch.stack([_layout_iou(*case) for case in cases])


def _layout_iou(image: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    found = detect(image)
    overlaps = []
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        kind = SHAPES[label // len(COLOURS)], COLOURS[label % len(COLOURS)]
        same = [item for item in found if (item.shape, item.colour) == kind]
        best = max(same, key=lambda item: _iou(Box(*box), _box(item.box)), default=None)
        overlaps.append(0.0 if best is None else _iou(Box(*box), _box(best.box)))
        found = [item for item in found if item is not best]
    return torch.tensor(overlaps).mean()


def _box(corners: tuple[float, float, float, float]) -> Box:
    left, top, right, bottom = corners
    return Box(left, top, right - left, bottom - top)


def _iou(first: Box, second: Box) -> float:
    shared = first.overlap(second)
    return shared / (first.width * first.height + second.width * second.height - shared)


def map_accuracy(images: Tensor, batch: Batch) -> Tensor:
    """Return the fraction of pixels whose detected class is that of `segmentation`, (B,).

    Of the batch: `segmentation` int64 (B, H, W), 0 for the background, then SHAPES.
    """
    pairs = zip(images, batch["segmentation"], strict=True)
    return torch.stack([(segment(image) == wanted).float().mean() for image, wanted in pairs])


def map_iou(images: Tensor, batch: Batch) -> Tensor:
    """Return the intersection over union of each shape's pixels, the mean over the shapes of the map, (B,).

    `segmentation` as for `map_accuracy`; each map has one shape at least.
    """
    return torch.stack([_map_iou(segment(x), wanted) for x, wanted in zip(images, batch["segmentation"], strict=True)])


def _map_iou(found: Tensor, wanted: Tensor) -> Tensor:
    classes = [index for index in wanted.unique().tolist() if index]
    pairs = [(found == index, wanted == index) for index in classes]
    return torch.stack([(one & other).sum() / (one | other).sum() for one, other in pairs]).mean()


def shrunk(images: Tensor, factor: int) -> Tensor:
    """Shrink images as `LowRes` does without degradation: (B, C, H/factor, W/factor)."""
    return torch.stack([super_resolution.downsample(image.clamp(-1, 1), factor) for image in images])


def enlarged(images: Tensor, factor: int) -> Tensor:
    """Enlarge images by bicubic interpolation: (B, C, H factor, W factor) in [-1, 1]."""
    return F.interpolate(images, scale_factor=factor, mode="bicubic", align_corners=False).clamp(-1, 1)


def sharpness(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, (B,): blur lowers it."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    return (across + (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))) / 2


def smoothly_filled(images: Tensor, mask: Tensor, num_iterations: int = 500) -> Tensor:
    """Fill holes, mask (B, 1, H, W) > 0, by the harmonic function of their edges: a baseline without a model.

    Solved by repeated averaging over the four neighbours, from the mean of the known pixels.
    """
    hole = (mask > 0).float()
    known = ((1 - hole) * images).sum((2, 3), keepdim=True) / (1 - hole).sum((2, 3), keepdim=True).clamp_min(1)
    filled = images * (1 - hole) + known * hole
    kernel = images.new_tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).expand(images.shape[1], 1, 3, 3) / 4
    for _ in range(num_iterations):
        average = F.conv2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
        filled = images * (1 - hole) + average * hole
    return filled
