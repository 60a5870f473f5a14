import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fitting import fit, largest_difference
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import autoencoder_training, class_diffusion

from ldm.errors import UserError
from ldm.images import image_grid, to_rgb_bytes
from ldm.models.guidance import Guidance
from ldm.sampling.ddim import DDIM
from ldm.training.callbacks import ImageLogger
from ldm.training.lightning_fixes.checkpoints import Checkpoints, Stopped
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.progress import Progress, duration
from ldm.weights import files as storage


def test_checkpoint_holds_plain_data_only_and_the_raw_weights(tmp_path: Path) -> None:
    model = class_diffusion()
    callback = Checkpoints(tmp_path, every_n_steps=2, keep_every_n_steps=2)
    fit(model, tmp_path, 4, callbacks=[callback], with_validation=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert largest_difference(storage.load(tmp_path / "last.ckpt")["state_dict"], model.state_dict()) == 0
    frozen = {name for name in model.state_dict() if name.startswith("first_stage_model.")}
    assert not frozen & content["state_dict"].keys() and content["frozen"]["names"].keys() == frozen
    assert len(list(tmp_path.glob("frozen-*.safetensors"))) == 1
    assert any(name.startswith("model_ema.") for name in content["state_dict"])
    assert torch.load(tmp_path / "step=000000002.ckpt", weights_only=True)["global_step"] == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_best_checkpoint_follows_the_monitored_metric(tmp_path: Path) -> None:
    callback = Checkpoints(tmp_path, monitor="val/rec_loss")
    trainer = fit(autoencoder_training(), tmp_path, 2, callbacks=[callback], with_validation=True, val_check_interval=2)
    assert (tmp_path / "best.ckpt").is_file()
    assert callback.state_dict()["best"] == trainer.callback_metrics["val/rec_loss"]


def test_broken_weights_never_replace_a_checkpoint(tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer) -> None:
            if trainer.global_step == 1:
                with torch.no_grad():
                    next(pl_module.model.parameters()).fill_(float("nan"))

    with pytest.raises(UserError, match="not finite"):
        fit(class_diffusion(), tmp_path, 3, callbacks=[Break(), Checkpoints(tmp_path, every_n_steps=1)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_saves_and_stops_at_the_next_step(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    class Send(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args) -> None:
            if trainer.global_step == 1:
                os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="saved step 2"):
        fit(class_diffusion(), tmp_path, 4, callbacks=[Send(), Checkpoints(tmp_path)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    "guidance", [{"guidance_scale": 2.0}, {"guidance": Guidance(2.0, (0.2, 0.9), rescale=0.5)}], ids=["scale", "more"]
)
def test_pictures_are_written_and_change_nothing(tmp_path: Path, guidance: dict) -> None:
    quiet, watched = class_diffusion(), class_diffusion()
    fit(quiet, tmp_path, 4)
    options = {"early_steps": True, "max_images": 2, "sampler": DDIM(3), **guidance}
    logger = ImageLogger(tmp_path / "images", every_n_steps=4, **options)
    fit(watched, tmp_path, 4, callbacks=[logger], with_validation=True)
    assert largest_difference(quiet.state_dict(), watched.state_dict()) == 0
    names = {path.name.split("_gs-")[0] for path in (tmp_path / "images" / "train").glob("*gs-000004*.png")}
    assert names == {"inputs", "reconstructions", "diffusion_row", "denoise_row", "samples", "samples_guided"}
    assert (tmp_path / "images" / "val" / "inputs_gs-000004_e-000000_b-000000.png").is_file()
    captions = (tmp_path / "images" / "train" / "captions_gs-000001_e-000000_b-000000.txt").read_text()
    assert captions == "a thing 0\na thing 1\n"


def test_pictures_that_cannot_be_written_are_told_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").write_text("a file where the folder would be")
    logger = ImageLogger(tmp_path / "images", every_n_steps=1, max_images=1, sampler=DDIM(2))
    module = class_diffusion()
    fit(module, tmp_path, 2, callbacks=[logger])
    assert int(module.trainer.global_step) == 2 and "images of step 1 could not be written" in caplog.text


def test_one_guidance_is_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image_logger: guidance_scale and guidance"):
        ImageLogger(tmp_path, guidance_scale=2.0, guidance=Guidance(2.0))


def test_pictures_of_an_autoencoder_show_the_average_too(tmp_path: Path) -> None:
    logger = ImageLogger(tmp_path, every_n_steps=2)
    fit(autoencoder_training(ema_decay=0.9), tmp_path, 2, callbacks=[logger])
    names = {path.name.split("_gs-")[0] for path in (tmp_path / "train").glob("*gs-000002*.png")}
    assert names == {"inputs", "reconstructions", "reconstructions_ema"}
    with Image.open(next((tmp_path / "train").glob("inputs_*.png"))) as image:
        assert image.size == (16, 8)


def test_tensorboard_gets_pictures_and_numbers(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="board")
    fit(autoencoder_training(), tmp_path, 2, callbacks=[ImageLogger(tmp_path, every_n_steps=2)], logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert {"train/inputs", "train/reconstructions"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("train/rec_loss")] == [1, 2]


def test_grid_places_images_by_rows_and_maps_minus_one_to_black() -> None:
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0, 5.0, 1.0)])
    pixels = image_grid(to_rgb_bytes(images), columns=2)
    assert pixels.shape == (3, 6, 4)
    assert np.array_equal(pixels[0, ::2, ::2].numpy(), [[0, 128], [255, 255], [255, 0]])
    shapes = [image_grid(to_rgb_bytes(torch.rand(1, channels, 4, 4)), 4).shape for channels in (1, 5)]
    assert shapes == [(3, 4, 4), (3, 4, 4)]


def test_metrics_gain_columns_and_go_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    logger.log_metrics({"epoch": 0.0, "a": 1.5}, 1)
    logger.log_metrics({"epoch": 0.0, "b": 0.25}, 2)
    logger.log_metrics({"epoch": 0.0, "a": 3.0}, 3)
    resumed = MetricsCsv(path)
    resumed.log_metrics({"epoch": 0.0, "a": 7.0}, 2)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1.5", ""), ("2", "7", "")]


def test_progress_speaks_of_rate_and_time_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ldm"):
        fit(class_diffusion(), tmp_path, 4, callbacks=[Progress(every_seconds=0)], enable_progress_bar=True)
    lines = [record.message for record in caplog.records if record.message.startswith("step 3/4")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("loss", "steps/s", "images/s", "left"))
    (first,) = [record.message for record in caplog.records if record.message.startswith("step 1 ")]
    assert "took" in first and "steps/s" not in first  # that one compiles: it says nothing of the others


def test_duration() -> None:
    assert duration(3723.9) == "1:02:03"
    assert duration(2 * 86400 + 5) == "2d 0:00:05"
