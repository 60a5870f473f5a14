"""What each conditional task of the paper asks of a model: the request of one image from boxes, a map, or an image.

Images are bytes (C, H, W). Sides that a model cannot have are filled up, and what was filled up is cropped again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.layout.boxes import FULL_IMAGE, Box, BoxTokenizer, LayoutObject, LayoutTokenizer
from ldm.data.layout.layout_files import LabelledBox, box_tensors, crop_layout
from ldm.data.readers.single_images import cropped, padded
from ldm.errors import UserError
from ldm.images import colour_classes, draw_boxes
from ldm.models.back_projection import back_project
from ldm.models.enlargement import enlargement
from ldm.models.image_request import ImageRequest
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import LoadedModel, train_option
from ldm.models.masking import Masking, known_part

LayoutModel = LayoutConditioner | TokenConditioner
PlaneModel = ImageConditioner | SpatialRescaler

# -------------------------------------------------------------------------------------------------------------- layouts


def layout_tokenizer(conditioner: LayoutModel) -> LayoutTokenizer:
    """Return the tokenizer of a model; the published one has boxes as tokens, whose classes are tokens themselves."""
    if isinstance(conditioner, LayoutConditioner):
        return conditioner.tokenizer
    vocab_size, length = conditioner.transformer.token_emb.num_embeddings, len(conditioner.null_ids)
    max_objects, crop = divmod(length, 3)
    return BoxTokenizer(vocab_size - 1, max_objects, vocab_size, encode_crop=crop == 2, use_group=False)


def layout_request(
    layout: Sequence[LabelledBox],
    conditioner: LayoutModel,
    size: tuple[int, int],
    crops: Sequence[Box] | None = None,
    names: Mapping[int, str] | None = None,
) -> ImageRequest:
    """Return the request of an image of (height, width) with these objects; `names` of their classes are only shown.

    crops: The tiles of the denoiser, each of which sees its own part of the layout.
    """
    if crops is None:
        conditions = _layout_entries(layout, conditioner, FULL_IMAGE)
    else:
        parts = [_layout_entries(layout, conditioner, crop) for crop in crops]
        conditions = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    texts = [(names or {}).get(item.label, str(item.label)) for item in layout]
    details = {"objects": [item._asdict() for item in layout]}
    return ImageRequest(size, conditions, details, source=draw_boxes([item.box for item in layout], size, texts))


def _layout_entries(layout: Sequence[LabelledBox], conditioner: LayoutModel, crop: Box) -> dict[str, Tensor]:
    """Return the batch entries of the part of a layout that a crop shows, as a conditioner reads them."""
    tokenizer = layout_tokenizer(conditioner)
    if isinstance(conditioner, LayoutConditioner):
        visible = crop_layout(layout, crop, relative=not tokenizer.encode_crop)
        boxes, labels = box_tensors(visible, tokenizer.max_objects)
        crops = {conditioner.crop_key: torch.tensor(crop)} if tokenizer.encode_crop else {}
        return {conditioner.key: boxes, conditioner.labels_key: labels, **crops}
    objects = [LayoutObject(item.label, Box(*item.box)) for item in layout]
    return {conditioner.key: torch.tensor(tokenizer.build(objects, crop))}


# ----------------------------------------------------------------------------------------- maps, and images to enlarge


def reads_maps(loaded: LoadedModel, conditioner: PlaneModel) -> bool:
    """Return whether a model sees maps of class indices, which are under `segmentation` unless the data say so."""
    return conditioner.key == "segmentation" or train_option(loaded.content, "num_classes") is not None


def map_request(
    indices: Tensor, conditioner: PlaneModel, model: LatentDiffusion, ignore_index: int | None = None, place: str = ""
) -> ImageRequest:
    """Return the request of the image of a map (H, W) of class indices. UserError, with `place`, for none of the model.

    ignore_index: Of the training data: pixels that belong to no class, and are shown black.
    """
    indices = _known_classes(indices, conditioner.in_channels, ignore_index, place)
    scale = enlargement(model, conditioner)
    size = tuple(int(side * scale) for side in indices.shape)
    whole = padded(indices, (model.side_multiple / scale).numerator)  # (h', w')
    return ImageRequest(
        tuple(int(side * scale) for side in whole.shape),
        {conditioner.key: whole},
        {"size": list(size)},
        source=F.interpolate(colour_classes(indices, conditioner.in_channels)[None], size, mode="nearest")[0],
        finish=partial(cropped, size=size),
    )


def _known_classes(indices: Tensor, num_classes: int, ignore_index: int | None, place: str) -> Tensor:
    """Return the map with -1, no class, where it has ignore_index. UserError for another index that is no class."""
    classes = indices[indices != ignore_index] if ignore_index is not None else indices.flatten()
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        also = "" if ignore_index is None else f", and {ignore_index} for none"
        raise UserError(f"{place}: has class {wrong[0]}; this model has classes 0 to {num_classes - 1}{also}")
    return indices if ignore_index is None else indices.masked_fill(indices == ignore_index, -1)


def enlargement_factor(loaded: LoadedModel, conditioner: PlaneModel) -> int | None:
    """Return the factor by which a model enlarges; None for a model of larger images, or of maps of class indices."""
    scale = enlargement(loaded.model, conditioner)
    return None if scale.denominator > 1 or reads_maps(loaded, conditioner) else int(scale)


def enlargement_request(
    image: Tensor, conditioner: PlaneModel, factor: int, model: LatentDiffusion, is_consistent: bool = False
) -> ImageRequest:
    """Return the request of an image enlarged by a factor; `is_consistent` corrects coarse colours to those given."""
    size = (image.shape[1] * factor, image.shape[2] * factor)
    low_res = padded(from_bytes(image), Fraction(model.side_multiple, factor).numerator)  # (C, h', w')
    return ImageRequest(
        (low_res.shape[1] * factor, low_res.shape[2] * factor),
        {conditioner.key: low_res},
        {"size": list(size)},
        source=image.repeat_interleave(factor, 1).repeat_interleave(factor, 2),
        finish=partial(_enlarged, size=size, low_res=low_res if is_consistent else None),
    )


def _enlarged(sample: Tensor, size: tuple[int, int], low_res: Tensor | None) -> Tensor:
    """Crop the bytes of a sample (C, H, W) to its size, corrected to the small image where one is given."""
    if low_res is not None:
        sample = to_bytes(back_project(from_bytes(sample)[None], low_res[None])[0])
    return cropped(sample, size)


# ----------------------------------------------------------------------------------------------------- holes and starts


def hole_request(
    image: Tensor, hole: Tensor, conditioner: Masking | None, multiple: int, texts: Mapping[str, str] | None = None
) -> ImageRequest:
    """Return the request for an image with a hole, bool (1, H, W); what is not in it is kept to the last bit.

    conditioner: What takes the mask; without it the known parts, noised, replace the samples' at every step.
    """
    size, (x, mask, masked) = tuple(image.shape[1:]), known_part(image, hole, multiple)
    conditions: dict[str, Any] = dict(texts or {})
    if conditioner is not None:
        conditions |= {conditioner.key: masked, conditioner.mask_key: mask}
    return ImageRequest(
        tuple(x.shape[1:]),
        conditions,
        {"size": list(size)},
        source=torch.where(hole, torch.zeros_like(image), image),
        target=(x, mask) if conditioner is None else None,
        finish=lambda sample: torch.where(hole, cropped(sample, size), image),
    )


def start_request(image: Tensor, multiple: int, conditions: Mapping[str, Any] | None = None) -> ImageRequest:
    """Return the request of an image that starts from a given one (SDEdit, arXiv 2108.01073)."""
    size, x = tuple(image.shape[1:]), padded(from_bytes(image), multiple)  # (C, H, W)
    finish = partial(cropped, size=size)
    return ImageRequest(tuple(x.shape[1:]), dict(conditions or {}), source=image, image=x, finish=finish)
