"""Adapter of the bounding-box and centre-point tokens."""

import random

import torch

from ldm.compat import instantiate
from ldm.data.layout.boxes import Box, LayoutObject

from .case import Case

FLAGS = {
    "is_group_of": "is_group",
    "is_occluded": "is_occluded",
    "is_depiction": "is_depiction",
    "is_inside": "is_inside",
}


def annotation(values: dict) -> LayoutObject:
    flags = {FLAGS[name]: bool(value) for name, value in values.items() if name in FLAGS}
    return LayoutObject(values["category_no"], Box(*values["bbox"]), **flags)


def bbox(case: Case, tmp_path) -> dict:
    case.allow_args("calls")
    tokenizer = instantiate(case.config)
    results = {"embedding_dim": tokenizer.length, "none": tokenizer.none_token}
    for i, call in enumerate(case.args["calls"]):
        objects = [annotation(values) for values in call["annotations"]]
        crop = Box(*call["crop"]) if call.get("crop") else None
        tokens = tokenizer.build(objects, crop, bool(call.get("flip")), random.Random(call["seed"]))
        layout = tokenizer.inverse_build(tokens)
        results[f"tokens{i}"] = torch.tensor(tokens)
        results[f"inverse{i}"] = torch.tensor([(token, *place) for token, place in layout.objects], dtype=torch.float64)
        if layout.crop is not None:
            results[f"crop_tokens{i}"] = torch.tensor(tokens[-2:])
            results[f"crop{i}"] = torch.tensor(layout.crop, dtype=torch.float64)
    return results


ADAPTERS = {"bbox": bbox}
