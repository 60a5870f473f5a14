"""A first stage on pictures of one, two and five channels, from the config for one's own data to pictures and PSNR."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_configs import draw

from ldm.cli.train import main

CONFIG = Path(__file__).parents[2] / "configs" / "own" / "autoencoder.yaml"
PARAMS = "model.params"
LPIPS = "{target: ldm.networks.perceptual.LPIPS, params: {random_features: true}}"
SMALL = [
    f"{PARAMS}.architecture.params.channels=32",
    f"{PARAMS}.architecture.params.channel_mult=[1,1]",
    f"{PARAMS}.architecture.params.num_res_blocks=1",
    "training.params.loss.params.discriminator.params.num_layers=1",
    "training.params.loss.params.discriminator.params.width=4",
    "training.params.loss.params.disc_start=1",
    f"training.params.loss.params.perceptual_loss={LPIPS}",
    "data.params.train.params.size=[16,24]",
    "data.params.train.params.validation_share=0.4",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "lightning.trainer.num_sanity_val_steps=0",
    "lightning.trainer.val_check_interval=2",
    "lightning.trainer.limit_val_batches=1",
    "lightning.callbacks.image_logger.params.every_n_steps=1",
]


@pytest.mark.parametrize("channels", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_trains_logs_and_measures(tmp_path, channels):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(12):
        values = rng.integers(0, 65536, (20, 30, channels)).astype(np.uint16)
        np.save(tmp_path / "data" / f"{i}.npy", values)
    arguments = ["--base", str(CONFIG), "-t", "--gpus", "0", "--max_steps", "2", "-l", str(tmp_path / "logs"), *SMALL]
    data = [f"data.params.train.params.root={tmp_path / 'data'}", f"data.params.train.params.channels={channels}"]
    assert main([*arguments, *data]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["encoder.conv_in.weight"].shape[1] == state["decoder.conv_out.weight"].shape[0] == channels
    assert draw(run, {"image": torch.zeros(1, channels, 32, 48)}).shape == (1, channels, 32, 48)
    pictures = sorted((run / "images" / "train").glob("reconstructions_*.png"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert picture.size == (2 * 24, 16) and picture.mode == "RGB"
    with (run / "metrics.csv").open() as stream:
        assert any(float(row["val/psnr"]) > 0 for row in csv.DictReader(stream) if row.get("val/psnr"))
