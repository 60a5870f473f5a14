"""Draw images of a text, without condition, or of classes.

    ldm sample "a red circle above a blue square" --run logs/RUN
    ldm sample --run logs/RUN --n_samples 16
    ldm sample --config cin256-v2.yaml --ckpt model.ckpt --classes 25,187 --n_samples 4 --scale 3

model.key=value overrides the config, e.g. model.params.latent_scale=0.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli.entry import main_guard
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.sampling import load_for_sampling, sample_into_folder
from ldm.conditioning.labels import ClassConditioner
from ldm.errors import UserError
from ldm.models.image_request import ImageRequest
from ldm.models.loading import LoadedModel

_DEFAULTS = Defaults("outputs/samples", steps=50, eta=1.0, n_samples=16)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples images, of each class if classes are given."""
    parser = SamplingParser("sample", __doc__, _DEFAULTS)
    classes = {"type": lambda text: list(map(int, text.split(","))), "metavar": "1,2,3"}
    parser.add_argument("--classes", **classes, help="labels to draw, n_samples of each")
    given, options = parser.parse(argv)
    loaded = load_for_sampling(options)
    entries, size = _conditions(loaded, given.classes), loaded.size(options.size)
    requests = (ImageRequest(size, entry, details=entry) for entry in entries)
    sample_into_folder(loaded, requests, len(entries), options, given.n_samples, max(1, min(given.n_samples, 8)))


def _conditions(loaded: LoadedModel, classes: list[int] | None) -> list[dict[str, int]]:
    """Return the conditions of the images. UserError if the model and --classes do not go together."""
    known = list(loaded.model.conditioners())
    others = [module.key for module in known if not isinstance(module, ClassConditioner)]
    if others:
        raise UserError(f"{loaded.config}: this model needs {', '.join(others)}; for text use ldm txt2img")
    if classes is None and known:
        raise UserError(f"this model draws classes 0 to {known[0].num_classes - 1}; choose some with --classes 1,2,3")
    if classes is None:
        return [{}]
    if not known:
        raise UserError(f"{loaded.config}: this model has no classes; leave --classes out")
    num_classes = min(module.num_classes for module in known)
    if wrong := [label for label in classes if not 0 <= label < num_classes]:
        raise UserError(f"--classes {wrong[0]}: this model has classes 0 to {num_classes - 1}")
    return [{module.key: label for module in known} for label in classes]
