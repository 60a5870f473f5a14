import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from fitting import loader
from tiny import autoencoder_training, class_diffusion
from torch.utils.data import IterableDataset

from ldm.data.shards.streams import StreamDecoder
from ldm.errors import UserError
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.sample_metrics import SampleMetrics


def fit(model: pl.LightningModule, folder: Path, callbacks: list[pl.Callback], validation: bool = True) -> None:
    trainer = pl.Trainer(
        max_steps=4, logger=[MetricsCsv(folder / "metrics.csv")], callbacks=callbacks, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=2,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, loader(), loader(6) if validation else None)


def test_figures_are_logged_and_training_is_not_touched(tmp_path: Path) -> None:
    watched, alone = class_diffusion(), class_diffusion()
    callback = SampleMetrics(tmp_path / "images", every_n_steps=2, count=6, steps=2)
    fit(watched, tmp_path, [callback])
    fit(alone, tmp_path / "alone", [])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("samples/frechet[scenenet]")]
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert all(float(row["samples/frechet[scenenet]"]) > 0 for row in rows)
    assert [path.name for path in (tmp_path / "sample_metrics").iterdir()] == ["references"]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from ({"image": torch.full((3, 8, 8), value)} for value in (-1.0, 1.0))


def test_streams_are_read_past_the_decoder_of_their_loader(tmp_path: Path) -> None:
    trainer = SimpleNamespace(val_dataloaders=SimpleNamespace(dataset=StreamDecoder(Stream(), evaluation=True)))
    assert len(SampleMetrics(tmp_path / "images", count=6)._validation_images(trainer)) == 2


def test_what_cannot_be_measured_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws no samples"):
        fit(autoencoder_training(), tmp_path, [SampleMetrics(tmp_path / "images")])
    with pytest.raises(UserError, match="needs a validation set"):
        fit(class_diffusion(), tmp_path, [SampleMetrics(tmp_path / "images")], validation=False)
    with pytest.raises(UserError, match="metrics fid: unknown"):
        fit(class_diffusion(), tmp_path, [SampleMetrics(tmp_path / "images", metrics=["fid"])])
    for options, message in (
        ({"extractor": f"scenenet:weights={tmp_path / 'none.safetensors'}"}, "scenenet: no weights at"),
        ({"metrics": ["kernel:size=7"]}, "kernel: needs 7 validation images or more, there are 6"),
        ({"metrics": ["layout_iou"]}, "layout_iou: needs 'boxes'"),
    ):
        with pytest.raises(UserError, match=message):
            fit(class_diffusion(), tmp_path, [SampleMetrics(tmp_path / "images", **options)])
