"""Draw pictures without condition, or of classes.

    python scripts/sample.py --run logs/RUN --n_samples 16
    python scripts/sample.py --config cin256-v2.yaml --ckpt model.ckpt --classes 25,187 --n_samples 4 --scale 3

model.key=value overrides the config, e.g. model.params.latent_scale=0.2.
"""

import argparse
from collections.abc import Sequence

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.common import (
    add_device_arguments,
    add_model_arguments,
    add_sampler_arguments,
    add_size_arguments,
    main_guard,
)
from ldm.cli.sampling import conditioners, draw_into_folder, load_for_sampling
from ldm.conditioning.labels import ClassConditioner
from ldm.errors import UserError
from ldm.models.loading import LoadedModel


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples pictures, of each class if classes are given."""
    options = parse(argv)
    loaded, sampler = load_for_sampling(options, overrides=options.overrides)
    conditions = class_conditions(loaded, options)
    count = len(next(iter(conditions.values()))) if conditions else options.n_samples
    draw_into_folder(loaded, sampler, options, conditions, count)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--classes", type=class_list, metavar="1,2,3", help="labels to draw, n_samples of each")
    add("-n", "--n_samples", type=int, default=16, help="how many pictures (default 16)")
    add("-l", "--outdir", "--logdir", default="outputs/samples", help="where pictures go")
    add_model_arguments(parser)
    add_sampler_arguments(parser, steps=50, eta=1.0, scale=1.0)
    add_size_arguments(parser)
    add_device_arguments(parser)
    options = parse_with_overrides(parser, argv)
    options.columns = max(1, min(options.n_samples, 8))
    return options


def class_list(text: str) -> list[int]:
    """Read labels separated by commas."""
    return [int(label) for label in text.split(",")]


def class_conditions(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, list[int]]:
    """Return each sample its label. UserError if the model and --classes do not go together."""
    known = conditioners(loaded)
    others = [module.key for module in known if not isinstance(module, ClassConditioner)]
    if others:
        raise UserError(f"{loaded.config}: this model needs {', '.join(others)}; for text use scripts/txt2img.py")
    if options.classes is None and known:
        raise UserError(f"this model draws classes 0 to {known[0].num_classes - 1}; choose some with --classes 1,2,3")
    if options.classes is not None and not known:
        raise UserError(f"{loaded.config}: this model has no classes; leave --classes out")
    labels = [label for label in options.classes or () for _ in range(options.n_samples)]
    for module in known:
        for label in labels:
            if not 0 <= label < module.num_classes:
                raise UserError(f"--classes {label}: this model has classes 0 to {module.num_classes - 1}")
    return {module.key: labels for module in known}


if __name__ == "__main__":
    main()
