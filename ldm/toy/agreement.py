"""How well pictures follow what was asked of them: boxes, maps of shapes, small pictures, holes.

Each function compares pictures with conditions of the same number and returns one value per picture, so that the same
pictures can be held against the right conditions and against those of others. Pictures are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.image_pairs import super_resolution
from ldm.data.layout.boxes import Box
from ldm.toy.captions import COLOURS, SHAPES
from ldm.toy.scene_detector import detect, segment


def layout_iou(images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the mean intersection over union of the asked boxes with the detected things of the same kind, (B,).

    boxes (B, N, 4) left, top, width, height in [0, 1]; labels (B, N) as `Shapes` numbers shape and colour, -1 for no
    box. A box whose thing was not found counts 0; a thing in the picture is counted for one box at most.
    """
    return torch.stack([_layout_iou(*case) for case in zip(images, boxes, labels, strict=True)])


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


def map_agreement(images: Tensor, maps: Tensor) -> Tensor:
    """Return the share of pixels whose detected class is the map's, (B,).

    maps int64 (B, H, W): 0 the background, then SHAPES.
    """
    pairs = zip(images, maps, strict=True)
    return torch.stack([(segment(image) == wanted).float().mean() for image, wanted in pairs])


def map_iou(images: Tensor, maps: Tensor) -> Tensor:
    """Return the intersection over union of the shapes' pixels, background left out, mean over the map's shapes, (B,).

    maps as for `map_agreement`; each shows a shape at least.
    """
    return torch.stack([_map_iou(segment(x), wanted) for x, wanted in zip(images, maps, strict=True)])


def _map_iou(found: Tensor, wanted: Tensor) -> Tensor:
    classes = [index for index in wanted.unique().tolist() if index]
    pairs = [(found == index, wanted == index) for index in classes]
    return torch.stack([(one & other).sum() / (one | other).sum() for one, other in pairs]).mean()


def psnr(images: Tensor, targets: Tensor, where: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,), of pixels in [-1, 1]; `where` (B, 1, H, W) > 0: only there."""
    weight = torch.ones_like(images[:, :1]) if where is None else (where > 0).float()
    squares = (images.clamp(-1, 1) - targets).square().mean(1, keepdim=True)  # (B, 1, H, W)
    error = (squares * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def shrunk(images: Tensor, factor: int) -> Tensor:
    """Shrink pictures as `LowRes` does without degradation: (B, C, H/factor, W/factor)."""
    return torch.stack([super_resolution.downsample(image.clamp(-1, 1), factor) for image in images])


def enlarged(images: Tensor, factor: int) -> Tensor:
    """Enlarge pictures by bicubic interpolation: (B, C, H factor, W factor) in [-1, 1]."""
    return F.interpolate(images, scale_factor=factor, mode="bicubic", align_corners=False).clamp(-1, 1)


def sharpness(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, (B,): blur lowers it."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    return (across + (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))) / 2


def smoothly_filled(images: Tensor, mask: Tensor, num_iterations: int = 500) -> Tensor:
    """Fill holes, mask (B, 1, H, W) > 0, by the harmonic function of their edges: what can be had without a model.

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
