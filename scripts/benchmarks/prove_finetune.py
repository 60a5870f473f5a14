"""Prove that a fine-tune learns a new shape from 20 images without losing the old ones, on the model of `make demo`.

The demo's model knows circles, squares and triangles. It gets a LoRA of its attention and of the convolutions of its
residual blocks, and new embeddings of its words, trained on 20 images of a ring, each with its caption, among scenes of
the old shapes. Before and after, rings are asked for and judged by their overlap with an ideal one, and unseen captions
of old shapes by the demo's own detector.

    python scripts/benchmarks/prove_finetune.py --run outputs/demo/logs/RUN_OF_TXT2IMG --out outputs/finetune
"""

import argparse
import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm import compat
from ldm.cli.entry import main_guard
from ldm.cli.options import progress
from ldm.evaluation.report import image_sheet
from ldm.images import to_pil, to_rgb_bytes
from ldm.toy.captions import COLOURS
from ldm.toy.runs import Sampling, load_run, sample_all
from ldm.toy.scene_detector import detect, verdict
from ldm.toy.shapes import PALETTE, held_out_captions
from ldm.training.run import train
from ldm.training.run_folder import new_run

SIZE, IMAGES, FITTING = 32, 20, 0.7
INNER = 0.5  # of the outer radius
MODULES = ["*.attn?.to_?", "*.attn?.to_out.0", "*.in_layers.2", "*.out_layers.3"]
ADAPTER = f"{{target: ldm.weights.adapters.LoRA, params: {{modules: {MODULES}, rank: 16}}}}"


def ring_shares(centre: np.ndarray, radius: float, size: int = SIZE) -> np.ndarray:
    """Return which share of each pixel (size, size) a ring covers; centre (x, y) and radius in the unit square."""
    grid = (np.arange(size) + 0.5) / size
    distance = np.hypot(grid[None, :] - centre[0], grid[:, None] - centre[1])
    middle, half = radius * (1 + INNER) / 2, radius * (1 - INNER) / 2
    return np.clip(0.5 - (np.abs(distance - middle) - half) * size, 0, 1)


def ring(colour: str, rng: np.random.Generator, size: int = SIZE) -> Tensor:
    """Draw a ring on a light canvas: (3, size, size) in [-1, 1]."""
    shares = ring_shares(rng.uniform(0.35, 0.65, 2), rng.uniform(0.17, 0.22), size)
    image = np.full((3, size, size), rng.uniform(0.88, 0.96))
    image += shares * (np.asarray(PALETTE[colour])[:, None, None] - image)
    return torch.from_numpy(image.astype(np.float32)) * 2 - 1


def is_ring(image: Tensor, colour: str) -> bool:
    """Return whether an image (3, H, W) in [-1, 1] shows one ring of a colour and nothing else."""
    found = detect(image)
    if len(found) != 1 or found[0].colour != colour:
        return False
    left, top, right, bottom = found[0].box
    centre, radius = np.asarray([left + right, top + bottom]) / 2, (right - left + bottom - top) / 4
    ideal = ring_shares(centre, radius, image.shape[-1])
    rgb, background = (image.numpy() + 1) / 2, np.median((image.numpy() + 1) / 2, axis=(1, 2), keepdims=True)
    towards = np.asarray(PALETTE[colour])[:, None, None] - background
    shares = np.clip(((rgb - background) * towards).sum(0) / (towards * towards).sum(), 0, 1)
    return float(np.minimum(shares, ideal).sum() / np.maximum(shares, ideal).sum()) > FITTING


def write_rings(folder: Path) -> Path:
    """Write the images with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, colour in enumerate(islice(cycle(COLOURS), IMAGES)):
        to_pil(to_rgb_bytes(ring(colour, rng)[None])[0]).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {colour} ring\n")
    return folder


def measure(run: Path, out: Path, count: int, sampling: Sampling) -> dict[str, float]:
    """Return the shares of rings and of unseen old captions that are drawn right; write a sheet of images."""
    colours = list(islice(cycle(COLOURS), count))
    asked = {"rings": [f"a {colour} ring" for colour in colours], "old": held_out_captions(count)}
    model, size, right = load_run(run, torch.device("cpu")).model, (SIZE, SIZE), {}
    drawn = {kind: sample_all(model, {"caption": texts}, size, sampling, progress) for kind, texts in asked.items()}
    right["rings"] = [is_ring(image, colour) for image, colour in zip(drawn["rings"], colours, strict=True)]
    right["old"] = [verdict(*pair).is_right for pair in zip(drawn["old"], asked["old"], strict=True)]
    shown = torch.cat([images[:10] for images in drawn.values()])
    image_sheet(shown, [text for texts in asked.values() for text in texts[:10]], out, columns=10)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def fine_tune(run: Path, rings: Path, logs: Path, steps: int) -> Path:
    """Train the adapter on the rings, a third of each batch, among old scenes; return the run folder."""
    reader = f"{{target: ldm.data.readers.captions.CaptionedFolder, params: {{root: {rings}, size: {SIZE}}}}}"
    old = "{target: ldm.toy.shapes.Shapes, params: {num_samples: 2000, num_objects: [1, 2], fields: [caption]}}"
    many = f"{{target: torch.utils.data.ConcatDataset, params: {{datasets: [{', '.join([reader] * 50 + [old])}]}}}}"
    words = [
        f"training.checkpoint={run}", f"training.params.adapter={ADAPTER}", "training.params.train=['*.token_emb.*']",
        "training.learning_rate=1.0e-3", "training.params.optimization.params.schedule=null",
        "data.params.train=null", f"data.params.train={many}", f"lightning.trainer.max_steps={steps}",
        "lightning.callbacks.image_logger=null", "lightning.cache_latents=null", "training.global_batch=32",
    ]  # fmt: skip
    return train(compat.load(run / "configs" / "config.yaml", words), new_run(logs, "rings")).folder


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, fine-tune, measure again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run of configs/demo/txt2img_shapes.yaml")
    add("--out", type=Path, default=Path("outputs/finetune"))
    add("--steps", type=int, default=600, help="of the training")
    add("--count", type=int, default=60, help="samples of each kind")
    given = parser.parse_args(argv)
    sampling, rings = Sampling(steps=50, scale=3.0), write_rings(given.out / "rings")
    before = measure(given.run, given.out / "before.png", given.count, sampling)
    tuned = fine_tune(given.run, rings, given.out / "logs", given.steps)
    after = measure(tuned, given.out / "after.png", given.count, sampling)
    (given.out / "figures.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
    print(f"drawn right, before and after: rings {before['rings']:.1%}, {after['rings']:.1%}; "
          f"old captions {before['old']:.1%}, {after['old']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
