"""Check before training that image size, channels and class ids of the data suit the model.

Conditioners say what they expect (`Conditioner.input_specs`); images must suit the first stage and the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ldm.conditioning.base import Conditioner, InputSpec
from ldm.data.core.classes import class_names
from ldm.data.core.module import DataModule
from ldm.doctor.summary import Summary
from ldm.errors import UserError
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import DiffusionTraining

__all__ = ["check_data_fits_model", "fit_problems", "missing_keys"]

_TRAININGS, _MOMENTS = (DiffusionTraining, AutoencoderTraining), "moments"
_NAMED = ("class_label", "box_labels")  # the keys whose classes `class_names` of a data set lists


def check_data_fits_model(model: nn.Module, data: DataModule) -> None:
    """Compare the first item of each data set, its keys and classes, with a model. Raises UserError, with the set."""
    for name, item in data.first_items.items():
        summary = Summary()
        summary.add(item)
        lacking = missing_keys(model, summary.keys) if item else []
        for problem in [*lacking, *fit_problems(model, summary, class_names(getattr(data, name)))]:
            raise UserError(f"data.params.{name}: {problem}")


def fit_problems(model: nn.Module, summary: Summary, names: Sequence[str] = ()) -> list[str]:
    """List what does not suit a model in the items of a summary, a line each. names: of the classes, by label."""
    found = list(_image_problems(model, summary))
    for part in _conditioners(model):
        for key, spec in part.input_specs().items():
            known = names if key in _NAMED else ()
            found += [f"{key}: {text}" for text in _entry_problems(type(part).__name__, spec, summary, key, known)]
    return found


def missing_keys(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """List the keys that a model and its conditioners read and items with `keys` do not have, a line each."""
    parts = [part for part in _conditioners(model) if part.entry_for((1, 1)) is None]
    read = {key: type(part).__name__ for part in parts for key in {part.key: None, **part.input_specs()}}
    if isinstance(model, _TRAININGS) and _MOMENTS not in keys:
        read = {model.image_key: type(model.model).__name__, **read}
    have = ", ".join(keys)
    return [f"{name} reads {key!r}, items have {have}" for key, name in read.items() if key not in keys]


def _conditioners(model: nn.Module) -> list[Conditioner]:
    return [part for part in model.modules() if isinstance(part, Conditioner)]


def _image_problems(module: nn.Module, summary: Summary) -> Iterator[str]:
    if not isinstance(module, _TRAININGS):
        return
    key = module.image_key
    shape, wanted = summary.shape(key), module.model.in_channels
    if shape is None:
        if key in summary.keys:
            yield f"{key}: items must hold a tensor or an array (C, H, W) of floats in [-1, 1]"
        return
    if problem := _form_problem(summary, key, wanted):
        yield f"{key}: {problem}"
        return
    channels, height, width = shape
    yield from size_problems(module, height, width)
    if channels != wanted:
        yield f"{key}: has {channels} channels, the autoencoder takes {wanted}; set channels: {wanted}, or in_channels"


def size_problems(module: nn.Module, height: int, width: int) -> Iterator[str]:
    """Yield what does not go with images of a size, in a first stage, in its losses and in a network."""
    if not isinstance(module, _TRAININGS):
        return
    multiple, key = module.model.side_multiple, module.image_key
    resize_range = module.resize_range if isinstance(module, AutoencoderTraining) else None
    if (height % multiple or width % multiple) and resize_range is None:
        yield (
            f"{key}: the size {height}x{width} does not go with this model, whose images need sides that {multiple} "
            f"divides; set size, e.g. to {[_nearest(side, multiple) for side in (height, width)]}"
        )
    elif isinstance(module, DiffusionTraining):
        if module.alignment is not None:
            factor = module.model.first_stage_model.factor
            if problem := module.alignment.grid_problem(height // factor, width // factor):
                yield problem
    elif isinstance(module, AutoencoderTraining):
        least = min(height, width, *(resize_range or ()))
        for name in ("discriminator", "perceptual_loss"):
            part = getattr(module.loss, name, None)
            if part is not None and _side_after(part, least) < 1:
                yield f"{key}: {least} pixels vanish in the layers of the {name}; make it shallower, or size larger"


def _side_after(network: nn.Module, side: int) -> int:
    """Return what is left of a side after the convolutions and poolings of a network, one after the other."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            sizes = (layer.kernel_size, layer.stride, layer.padding)
            kernel, stride, padding = (value if isinstance(value, int) else value[0] for value in sizes)
            side = (side + 2 * padding - kernel) // stride + 1
    return side


def _form_problem(summary: Summary, key: str, channels: int) -> str | None:
    """Return why the tensors under a key are no images float (C, H, W), None if they are."""
    dtype, shape = summary.dtype(key), summary.shape(key)
    if not dtype.is_floating_point:
        return f"is {str(dtype).removeprefix('torch.')}, of unknown range; give floats in [-1, 1], e.g. x / 127.5 - 1"
    if len(shape) != 3:
        return f"items must be (C, H, W); this is {list(shape)}"
    if shape[0] != channels and (shape[2] == channels or shape[2] <= 4 < shape[0]):
        return f"items must be (C, H, W); this is (H, W, C), {list(shape)}: permute(2, 0, 1) makes it right"
    return None


def _nearest(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _entry_problems(name: str, spec: InputSpec, summary: Summary, key: str, names: Sequence[str]) -> Iterator[str]:
    """Compare one key of the items with what the conditioner `name` expects there."""
    indices, shape = summary.indices(key), summary.shape(key)
    is_image = spec.channels is not None and shape is not None and len(shape) == 3
    if indices and spec.num_classes is not None and not is_image:
        highest = max(*indices, len(names) - 1)
        if highest >= spec.num_classes:
            raised = "num_classes" if spec.channels is None else "in_channels"
            yield f"has the class {highest}, but {name} takes 0 to {spec.num_classes - 1}; raise its {raised}"
        if spec.reserved is not None and (spec.reserved in indices or spec.reserved < len(names)):
            yield f"{spec.reserved} is a class of the data, but means 'no class' to {name}; set null_label to no class"
    elif shape is not None and spec.channels is not None:
        if problem := _form_problem(summary, key, spec.channels):
            yield problem
        elif spec.channels != shape[0]:
            yield f"has {shape[0]} channels, but {name} takes {spec.channels}"
