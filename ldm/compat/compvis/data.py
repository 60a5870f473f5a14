"""CompVis data -> ours: data module, the data sets that exist here in another form, layout tokens.

Only building the data may fail for want of a class or a folder, since the model needs neither: what has no counterpart
becomes a node that says so when it is built. Folders and lists are where the original expects them.
"""

import logging
import os
from typing import Any, NoReturn

from ldm.compat.compvis.params import Node, Params, Translate, node
from ldm.errors import UserError

log = logging.getLogger(__name__)

_FACES = {"CelebAHQ": "celebahq", "FFHQ": "ffhq"}
_LSUN = {"Churches": ("church_outdoor", "churches"), "Bedrooms": ("bedrooms", "bedrooms"), "Cats": ("cat", "cats")}
_IMAGENET = {"Train": "ILSVRC2012_train", "Validation": "ILSVRC2012_validation"}
_SPLITS = {"Train": "train", "Validation": "val"}  # as the original's lists call them
_BUILDERS = "taming.data.conditional_builder"
# Beginnings of targets of the original whose absence is no mistake in the config.
_ELSEWHERE = (
    "taming.data.", "ldm.data.base.", "ldm.data.imagenet.", "ldm.data.lsun.", "ldm.data.openimages.",
    "ldm.data.faceshq.", "ldm.data.landscapes.", "ldm.data.previews.", "ldm.data.laion.", "sgm.data.",
)  # fmt: skip
_REMEDIES = {
    "OpenImagesBBox": "write one whose items hold coordinates_bbox, tokens of an ldm.data.layout.boxes.BoxTokenizer",
    "DataModuleFromConfig": "use ldm.data.core.module.DataModule, its train an ldm.data.shards.shards.Shards with urls",
    "Previews": "use ldm.data.readers.captions.CaptionedFolder with your own pictures and captions",
    "Caption": "use ldm.data.readers.captions.CaptionedFolder",
}
_ANY_REMEDY = "name one of ours in its place, such as ldm.data.readers.folders.ImageFolder with root and size"


class MissingDataset:
    """Stand in a translated config for a data set that has no counterpart; a UserError with the remedy when made."""

    def __init__(self, original: str, remedy: str = _ANY_REMEDY) -> None:
        raise UserError(f"there is no data set {original} here; {remedy}")

    def __getitem__(self, index: int) -> NoReturn:
        raise NotImplementedError


def without_counterpart(target: str) -> Translate | None:
    """Return the translation of a data set of the original that is not here; None for any other target."""
    if not target.startswith(_ELSEWHERE):
        return None
    remedy = next((remedy for name, remedy in _REMEDIES.items() if name in target), _ANY_REMEDY)

    def translate(p: Params) -> Node:
        p.drop(*p)
        return node(f"{__name__}.MissingDataset", original=target, remedy=remedy)

    return translate


def data_module(p: Params) -> Node:
    """Translate DataModuleFromConfig."""
    params = p.given("batch_size", "num_workers")
    for split in ("train", "validation", "test"):
        if p.peek(split) is not None:
            params[split] = p.child(split)
    p.drop("train", "validation", "test", "predict", "wrap", "use_worker_init_fn")
    p.drop("shuffle_test_loader", "shuffle_val_dataloader")
    return node("ldm.data.core.module.DataModule", **params)


def _folder(root: str, **params: Any) -> Node:
    return node("ldm.data.readers.folders.ImageFolder", root=root, **params)


def _faces(name: str, split: str) -> Translate:
    """Translate a face data set; without the original's lists, CelebA-HQ being lists of numpy files there."""

    def translate(p: Params) -> Node:
        p.drop("keys")
        return _folder(f"data/{_FACES[name]}", size=p.take("size"), split=split.lower())

    return translate


def _lsun(name: str, split: str) -> Translate:
    list_name, folder = _LSUN[name]

    def translate(p: Params) -> Node:
        p.with_default("flip_p", 0.5 if split == "Train" else 0.0)
        p.with_default("txt_file", f"data/lsun/{list_name}_{_SPLITS[split]}.txt")
        return lsun(p.with_default("data_root", f"data/lsun/{folder}"))

    return translate


def lsun(p: Params) -> Node:
    """Translate LSUNBase: central squares of the pictures in a list."""
    interpolation = p.choose(
        "interpolation", "bicubic",
        {"bicubic": "bicubic", "linear": "bilinear", "bilinear": "bilinear", "lanczos": "lanczos"},
    )  # fmt: skip
    root, list_file = p.take("data_root"), p.take("txt_file")
    return _folder(
        root, list_file=list_file, size=p.take("size"), flip=p.take("flip_p", 0.5), interpolation=interpolation
    )


def _imagenet(split: str) -> Translate:
    """Translate ImageNet; labels are ranks of the class folders, as there."""

    def translate(p: Params) -> Node:
        root = _imagenet_root(split, p.take("data_root", None))
        p.drop("process_images")
        options = p.inside("config", None)
        size = options.take("size", 256)
        is_random = options.take(f"ImageNet{split}/random_crop", split == "Train")
        if options.take("sub_indices", None) is not None:
            options.drop(*options)
            return node(f"{__name__}.MissingDataset", original=f"{p.target} with sub_indices")
        options.drop("keep_orig_class_label")
        options.close()
        crop = "random" if is_random else "center"
        return _folder(root, size=size, class_folders=True, crop=crop, interpolation="bilinear")

    return translate


def _imagenet_crops(split: str) -> Translate:
    """Translate ImageNetSR as far as autoencoders use it: pictures, without their degraded versions."""

    def translate(p: Params) -> Node:
        p.drop("degradation", "downscale_f", "min_crop_f", "max_crop_f", "random_crop")
        log.warning("%s: gives the pictures alone, not LR_image, and crops at one scale", p.node_path or p.target)
        crop = "random" if split == "Train" else "center"
        return _folder(_imagenet_root(split), size=p.take("size"), crop=crop, interpolation="box")

    return translate


def _imagenet_root(split: str, data_root: str | None = None) -> str:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return f"{data_root or f'{cache}/autoencoders/data'}/{_IMAGENET[split]}/data"


def _open_images(split: str) -> Translate:
    """Translate FullOpenImages, which was never released: crops of pictures scaled to a shortest side, or unscaled."""

    def translate(p: Params) -> Node:
        crop = "random" if split == "Train" else "center"
        root = f"data/openimages/{split.lower()}"
        return _folder(root, size=p.take("crop_size"), resize=p.take("size", None) or "none", crop=crop)

    return translate


def custom(p: Params) -> Node:
    """Translate CustomTrain and CustomTest: a text file of paths."""
    lists = p.given("training_images_list_file>list_file", "test_images_list_file>list_file")
    return _folder(".", size=p.take("size"), **lists)


def _tokenizer(name: str) -> Translate:
    def translate(p: Params) -> Node:
        params = p.given(
            "no_object_classes>num_classes", "no_max_objects>max_objects", "no_tokens>vocab_size", "encode_crop",
            "use_group_parameter>use_group", "use_additional_parameters>use_attributes",
        )  # fmt: skip
        return node(f"ldm.data.layout.boxes.{name}", **params)

    return translate


TABLE: dict[str, Translate] = {
    "main.DataModuleFromConfig": data_module,
    "ldm.data.lsun.LSUNBase": lsun,
    f"{_BUILDERS}.objects_bbox.ObjectsBoundingBoxConditionalBuilder": _tokenizer("BoxTokenizer"),
    f"{_BUILDERS}.objects_center_points.ObjectsCenterPointsConditionalBuilder": _tokenizer("CentrePointTokenizer"),
    "taming.data.custom.CustomTrain": custom,
    "taming.data.custom.CustomTest": custom,
}
for _split in _SPLITS:
    TABLE[f"ldm.data.imagenet.ImageNet{_split}"] = _imagenet(_split)
    TABLE[f"ldm.data.imagenet.ImageNetSR{_split}"] = _imagenet_crops(_split)
    TABLE[f"ldm.data.openimages.FullOpenImages{_split}"] = _open_images(_split)
    TABLE |= {f"ldm.data.lsun.LSUN{name}{_split}": _lsun(name, _split) for name in _LSUN}
    TABLE |= {
        f"{home}.data.faceshq.{name}{_split}": _faces(name, _split) for name in _FACES for home in ("ldm", "taming")
    }
