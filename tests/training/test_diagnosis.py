"""Warnings of the adversarial phase and of the codebook: when, once, and never without a reason."""

import logging
from pathlib import Path

import pytest
import torch
from fitting import fit
from tiny import autoencoder_training, vq_training

from ldm.autoencoder.losses import Adversary, VQLoss
from ldm.cli.arguments import parse
from ldm.cli.train import plan_of
from ldm.networks.discriminator import PatchDiscriminator
from ldm.training.diagnosis import AdversarialWarnings
from ldm.training.trainer import build_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "autoencoder" / "vq_f4.yaml"
HEALTHY = {"train/disc_accuracy": 0.7, "train/d_weight": 3.0, "train/codebook_usage": 0.8}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ldm.training.diagnosis"]


def test_a_sick_training_is_told_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = vq_training(num_codes=1000, adversary=Adversary(max_weight=1e-3, weight=0.5))
    model.learning_rate = 0.0
    last = model.loss.discriminator.main[-1]
    with torch.no_grad():
        last.bias.fill_(1.0)  # everything looks real: right for half of the pictures
        last.weight.mul_(1e-4)
    fit(model, tmp_path, 8, callbacks=[AdversarialWarnings(patience=3)])
    messages = said(caplog)
    assert len(messages) == 3
    assert [message for message in messages if "learns nothing: for 3 logged intervals" in message]
    assert [message for message in messages if "at its cap, 0.0005" in message]
    assert [message for message in messages if "codebook collapses: for 3 logged" in message]


def test_a_sound_training_is_left_in_peace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = AdversarialWarnings(patience=2)
    loss = VQLoss(disc_start=10, discriminator=PatchDiscriminator(width=4, num_layers=1))
    for step in range(11, 30):
        watch.examine(HEALTHY, loss, step)
    fit(autoencoder_training(disc_start=100), tmp_path, 4, callbacks=[AdversarialWarnings(patience=1)])
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("name", "value", "is_told"),
    [
        ("train/disc_accuracy", 0.5, [False, True, True]),
        ("train/d_weight", 1e4, [True, True, True]),
        ("train/codebook_usage", 0.05, [False, True, True]),
    ],
)
def test_symptoms_must_last(name: str, value: float, is_told: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    loss = VQLoss(disc_start=10, discriminator=PatchDiscriminator(width=4, num_layers=1))
    watch, sick, counts = AdversarialWarnings(patience=2), HEALTHY | {name: value}, []
    with caplog.at_level(logging.WARNING):
        if name != "train/codebook_usage":  # which counts from the start
            for step in range(5):
                watch.examine(sick, loss, step)
        watch.examine(sick, loss, 11)
        counts.append(bool(said(caplog)))
        watch.examine(sick, loss, 12)
        counts.append(bool(said(caplog)))
        watch.examine(sick, loss, 13)
        counts.append(len(said(caplog)) == 1)
    assert counts == is_told


def test_an_interruption_starts_the_count_anew(caplog: pytest.LogCaptureFixture) -> None:
    watch, sick = AdversarialWarnings(patience=2), HEALTHY | {"train/codebook_usage": 0.01}
    for metrics in (sick, HEALTHY, sick, HEALTHY):
        watch.examine(metrics, VQLoss(), 1)
    assert said(caplog) == []


@pytest.mark.parametrize(("words", "is_there"), [([], True), (["lightning.callbacks.diagnosis=null"], False)])
def test_every_training_is_watched_unless_it_says_no(tmp_path: Path, words: list[str], is_there: bool) -> None:
    plan = plan_of(parse(["-b", str(CONFIG), "-l", str(tmp_path), "--accelerator", "cpu", *words]))
    assert any(isinstance(callback, AdversarialWarnings) for callback in build_trainer(plan).callbacks) is is_there
