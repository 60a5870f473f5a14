"""The demo: train both stages of a text-to-image model on generated scenes, sample, measure, and write a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ldm.evaluation.intervals import share_text
from ldm.evaluation.report import Panel, Section, image_sheet, plot_panels, read_curve, write_page
from ldm.toy.runs import CONFIGS, Progress, Sampling, load_run, sample_all
from ldm.toy.scene_detector import Verdict, verdict
from ldm.toy.shapes import held_out_captions
from ldm.training.stages import train_config

_log = logging.getLogger(__name__)
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


def run_demo(
    folder: Path,
    num_captions: int,
    sampling: Sampling,
    device: torch.device,
    progress: Progress,
    overrides: Sequence[str] = (),
    config: str = "txt2img_shapes",
) -> Path:
    """Train both stages into `folder`/logs, sample PROMPTS and unseen captions, and return the path of the report.

    config: name of the second stage in configs/demo.
    """
    start, logs = time.monotonic(), folder / "logs"
    title = "1/4 the autoencoder (about 3 minutes on two cores)"
    first = train_config(CONFIGS / "autoencoder_shapes.yaml", logs, overrides, title)
    weights = f"model.params.autoencoder.checkpoint={first}"
    title = "2/4 the diffusion model (about 9 minutes)"
    second = train_config(CONFIGS / f"{config}.yaml", logs, [weights, *overrides], title)
    _log.info("\n3/4 sampling ten captions, and %d that training never showed", num_captions)
    loaded = load_run(second, device)
    captions = held_out_captions(num_captions)
    size = loaded.trained_size()
    images, drawn = (
        sample_all(loaded.model, {"caption": list(texts)}, size, sampling, progress) for texts in (PROMPTS, captions)
    )
    verdicts = [verdict(image, caption) for image, caption in zip(drawn, captions, strict=True)]
    _log.info("\n4/4 the report")
    minutes = (time.monotonic() - start) / 60
    report = write_report(folder, (first, second), images, (captions, drawn, verdicts), minutes)
    right = sum(item.is_right for item in verdicts)
    _log.info("%s unseen captions drawn right; %.1f minutes; see %s", share_text(right, len(captions)), minutes, report)
    return report


def write_report(
    folder: Path,
    runs: tuple[Path, Path],
    images: Tensor,
    judged: tuple[Sequence[str], Tensor, Sequence[Verdict]],
    minutes: float,
) -> Path:
    """Write images, curves and page; return the path of the page."""
    captions, drawn, verdicts = judged
    image_sheet(images, PROMPTS, folder / "samples.png", columns=5)
    marks = [f"{outcome(item)}: {caption}" for item, caption in zip(verdicts, captions, strict=True)]
    image_sheet(drawn[:20], marks[:20], folder / "unseen.png", columns=5)
    wrong = [i for i, item in enumerate(verdicts) if not item.is_right][:10]
    plot_losses(runs, folder / "losses.png")
    _, psnr = read_curve(runs[0] / "metrics.csv", "val/psnr")[-1]
    right = sum(item.is_right for item in verdicts)
    table = [
        ("measure", "value"),
        ("validation PSNR of the autoencoder", f"{psnr:.2f} dB"),
        ("unseen two-object captions drawn right", share_text(right, len(captions))),
        ("time, both trainings and all samples", f"{minutes:.1f} minutes"),
    ]
    reconstructions = sorted((runs[0] / "images").rglob("*reconstructions*.png"))[-1:]
    sections = [
        Section("Figures", "Judged by shapes' geometry and colours alone (ldm/toy/scene_detector.py).", table),
        Section("Ten captions", images=[folder / "samples.png"]),
        Section("Captions never seen in training", "The first twenty.", images=[folder / "unseen.png"]),
        Section("Reconstructions of validation scenes", images=reconstructions),
        Section("Losses", images=[folder / "losses.png"]),
    ]
    if wrong:
        image_sheet(drawn[wrong], [marks[i] for i in wrong], folder / "wrong.png", columns=5)
        sections.insert(3, Section("Those judged wrong", "At most ten.", images=[folder / "wrong.png"]))
    write_page(folder / "report.html", "Text to image in a quarter of an hour", sections)
    return folder / "report.html"


def outcome(item: Verdict) -> str:
    """Return "right", or "wrong" with the parts of the caption that are not drawn."""
    amiss = [name for name, value in asdict(item).items() if not value]
    return f"wrong {', '.join(amiss)}" if amiss else "right"


def plot_losses(runs: tuple[Path, Path], path: Path) -> None:
    """Plot the training and validation losses of both stages."""
    first, second = (run / "metrics.csv" for run in runs)
    losses = (first, "train/rec_loss", "val/rec_loss"), (second, "train/loss_simple", "val/loss_simple_ema")
    curves = [{name: read_curve(file, name) for name in names} for file, *names in losses]
    plot_panels([Panel("step", "autoencoder loss", curves[0]), Panel("step", "diffusion loss", curves[1])], path)
