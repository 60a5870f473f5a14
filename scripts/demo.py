"""Train a text-to-image latent diffusion model in front of you: both stages, on two CPU cores, nothing downloaded.

    python scripts/demo.py

1. trains the autoencoder on generated scenes, 2. trains the diffusion model on its latents, 3. draws ten captions,
4. draws captions never seen in training and lets a detector that knows nothing of the model judge them, 5. writes
outputs/demo/report.html. Every command that it runs is printed, so that each can be run by itself.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.common import choose_device, main_guard, progress
from ldm.evaluation.report import Section, picture_sheet, plot_curves, read_curve, write_page
from ldm.models.generate import Request, generate
from ldm.models.loading import LoadedModel, load_model
from ldm.sampling.ddim import DDIM
from ldm.toy.scene_detector import Verdict, verdict
from ldm.toy.shapes import held_out_captions
from ldm.training.stages import train_config

_log = logging.getLogger("ldm.demo")
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
PROMPTS = (
    "a red circle to the left of a blue square",
    "a green triangle above a yellow circle",
    "a purple square below a black triangle",
    "a blue circle to the right of a green square",
    "a yellow triangle to the left of a purple circle",
    "a small red square above a large green circle",
    "a black circle",
    "a large yellow triangle",
    "a red triangle to the right of a green square",
    "a black square above a red circle",
)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts of the demo and say where the report is."""
    options = parse(argv)
    start = time.monotonic()
    logs, given = Path(options.outdir) / "logs", options.overrides
    title = "1/4 the autoencoder (about 3 minutes on two cores)"
    first = train_config(CONFIGS / "autoencoder_shapes.yaml", logs, given, title)
    weights = f"model.params.autoencoder.checkpoint={first}"
    title = "2/4 the diffusion model (about 9 minutes)"
    second = train_config(CONFIGS / "txt2img_shapes.yaml", logs, [weights, *given], title)
    _log.info("\n3/4 drawing ten captions, and %d that training never showed", options.num_captions)
    loaded = load_model(second, choose_device(options.device))
    pictures = draw(loaded, PROMPTS, options)
    captions = held_out_captions(options.num_captions)
    drawn = draw(loaded, captions, options)
    verdicts = [verdict(image, caption) for image, caption in zip(drawn, captions, strict=True)]
    _log.info("\n4/4 the report")
    minutes = (time.monotonic() - start) / 60
    report = write_report(Path(options.outdir), (first, second), pictures, (captions, drawn, verdicts), minutes)
    right = sum(item.is_right for item in verdicts)
    _log.info("%d of %d unseen captions drawn right; %.1f minutes; see %s", right, len(captions), minutes, report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outdir", default="outputs/demo", help="where runs and report go")
    parser.add_argument("--num-captions", type=int, default=200, help="unseen two-object captions to judge")
    parser.add_argument("--ddim_steps", type=int, default=50)
    parser.add_argument("--scale", type=float, default=3.0, help="classifier-free guidance")
    parser.add_argument("--batch-size", type=int, default=50, help="samples drawn at a time")
    parser.add_argument("--device", default="auto")
    parser.epilog = "Any further dotted.key=value overrides the configs of both trainings."
    return parse_with_overrides(parser, argv)


def draw(loaded: LoadedModel, captions: Sequence[str], options: argparse.Namespace) -> Tensor:
    """Draw one picture (3, H, W) in [-1, 1] for each caption."""
    sampler = DDIM(options.ddim_steps)
    size = loaded.trained_size()
    request = Request(range(len(captions)), size, {"caption": list(captions)}, options.scale, options.batch_size)
    total = -(-len(captions) // options.batch_size) * options.ddim_steps
    with progress(total, f"{len(captions)} captions") as bar:
        parts = [part.images for part in generate(loaded.model, sampler, request, lambda step: bar.update())]
    return torch.cat(parts).clamp(-1, 1).cpu()


def write_report(
    folder: Path,
    runs: tuple[Path, Path],
    pictures: Tensor,
    judged: tuple[Sequence[str], Tensor, Sequence[Verdict]],
    minutes: float,
) -> Path:
    """Write the pictures, the curves and the page. Returns the path of the page."""
    captions, drawn, verdicts = judged
    picture_sheet(pictures, PROMPTS, folder / "samples.png", columns=5)
    marks = [f"{outcome(item)}: {caption}" for item, caption in zip(verdicts, captions, strict=True)]
    picture_sheet(drawn[:20], marks[:20], folder / "unseen.png", columns=5)
    wrong = [i for i, item in enumerate(verdicts) if not item.is_right][:10]
    plot_losses(runs, folder / "losses.png")
    _, psnr = read_curve(runs[0] / "metrics.csv", "val/psnr")
    right = sum(item.is_right for item in verdicts)
    table = [
        ("measure", "value"),
        ("validation PSNR of the autoencoder", f"{psnr[-1]:.2f} dB"),
        ("unseen two-object captions drawn right", f"{right} of {len(captions)} ({right / len(captions):.1%})"),
        ("time, both trainings and all samples", f"{minutes:.1f} minutes"),
    ]
    reconstructions = sorted((runs[0] / "images").rglob("*reconstructions*.png"))[-1:]
    sections = [
        Section("Figures", "Judged by shapes' geometry and colours alone (ldm/evaluation/scene_detector.py).", table),
        Section("Ten captions", pictures=[folder / "samples.png"]),
        Section("Captions never seen in training", "The first twenty.", pictures=[folder / "unseen.png"]),
        Section("Reconstructions of validation scenes", pictures=reconstructions),
        Section("Losses", pictures=[folder / "losses.png"]),
    ]
    if wrong:
        picture_sheet(drawn[wrong], [marks[i] for i in wrong], folder / "wrong.png", columns=5)
        sections.insert(3, Section("Those judged wrong", "At most ten.", pictures=[folder / "wrong.png"]))
    write_page(folder / "report.html", "Text to image in a quarter of an hour", sections)
    return folder / "report.html"


def outcome(item: Verdict) -> str:
    """Say in a word or two whether a caption is drawn, and if not, what is amiss."""
    amiss = [name for name, value in asdict(item).items() if not value]
    return f"wrong {', '.join(amiss)}" if amiss else "right"


def plot_losses(runs: tuple[Path, Path], path: Path) -> None:
    """Draw the training and validation losses of both stages."""
    first, second = (run / "metrics.csv" for run in runs)
    panels = {
        "autoencoder": {name: read_curve(first, name) for name in ("train/rec_loss", "val/rec_loss")},
        "diffusion": {name: read_curve(second, name) for name in ("train/loss_simple", "val/loss_simple_ema")},
    }
    plot_curves(panels, path)


if __name__ == "__main__":
    main()
