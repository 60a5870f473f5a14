"""What stays in float32 under mixed precision, and how near bfloat16 stays to float32 in training."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import fit, loader
from tiny import autoencoder_training, class_diffusion
from torch import nn

from ldm.autoencoder.losses import KLLoss
from ldm.autoencoder.regularizers import DiagonalGaussian, VectorQuantizer
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Epsilon
from ldm.networks.layers import GroupNorm32, LayerNorm32
from ldm.training.randomness import Draws

HALVES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_of_half_precision_inputs_are_float32(dtype: torch.dtype) -> None:
    x, y = (torch.randn(2, 3, 64, 64).to(dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        process = DiscreteVP.linear(5)
        terms = Objective("l2").bind(process, Epsilon())(x, y, process.level(torch.tensor([0, 3])))
        nll, logs = KLLoss(kl_weight=0.0).generator(x, y, torch.ones((), dtype=dtype), 0, nn.Parameter(torch.ones(1)))
    values = (*terms._replace(variance=terms.loss), nll, *logs.values())  # there is no learned variance
    assert {value.dtype for value in values} == {torch.float32}
    exact = (x.double() - y.double()).square().mean()
    assert float(terms.loss) == pytest.approx(float(exact), rel=1e-6)
    assert nll.item() == pytest.approx(float((x.double() - y.double()).abs().sum() / 2), rel=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_divergence_and_distances_are_float32(dtype: torch.dtype) -> None:
    moments = (10 * torch.randn(2, 8, 32, 32)).clamp(-20, 20).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        divergence = DiagonalGaussian(moments).kl()
    mean, logvar = moments.double().chunk(2, dim=1)
    exact = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    assert divergence.dtype == torch.float32 and relative(divergence, exact) < 1e-5

    quantizer = VectorQuantizer(64, 4)
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 4, 16, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, info = quantizer(z)
    codes = torch.cdist(z.double().permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding.weight.double())
    assert loss.dtype == torch.float32 and torch.equal(info["indices"].flatten(), codes.argmin(1))


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_of_norms_and_softmax_lose_nothing_but_the_last_rounding(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 32, 64, 64) + 8).to(dtype)  # a mean much larger than the spread: sums in half would not do
    rounding = torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        group, layer = GroupNorm32(32)(x), LayerNorm32(64)(x)
    # Autocast would choose its own half; the kernel is the one that the networks call.
    attention = nn.functional.scaled_dot_product_attention(x[:, :4], x[:, 4:8], x[:, 8:12] - 8)
    assert relative(group, nn.functional.group_norm(x.double(), 32)) < rounding
    assert relative(layer, nn.functional.layer_norm(x.double(), (64,))) < rounding
    q, k, v = x[:, :4].double(), x[:, 4:8].double(), (x[:, 8:12] - 8).double()
    assert relative(attention, nn.functional.scaled_dot_product_attention(q, k, v)) < 2 * rounding


def test_latents_that_are_not_regularised_are_float32() -> None:
    model = class_diffusion().model
    model.first_stage_model.regularization = VectorQuantizer(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.latents(next(iter(loader())), Draws.keyed(CPU, 0).normal)
    assert z.dtype == torch.float32


class Curve(pl.Callback):
    """Keep one logged value of every step."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.name in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics[self.name]))


@pytest.mark.proof
@pytest.mark.parametrize(
    ("make", "metric", "band"),
    [(lambda: autoencoder_training(disc_start=6, ema_decay=0.9), "train/rec_loss", 0.05),
     (lambda: class_diffusion(), "train/loss_simple", 0.05)],
)  # fmt: skip
def test_bfloat16_follows_float32(make: Any, metric: str, band: float, tmp_path: Path) -> None:
    curves = []
    for precision in ("32-true", "bf16-mixed"):
        model, curve = make(), Curve(metric)
        model.learning_rate = 1e-3
        fit(model, tmp_path, 16, precision=precision, callbacks=[curve], gradient_clip_val=1.0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        if model.model_ema is not None:
            assert all(b.dtype == torch.float32 for n, b in model.model_ema.named_buffers() if n != "num_updates")
        curves.append(torch.tensor(curve.values))
    exact, half = curves
    assert len(exact) == 15 and exact[-4:].mean() < exact[:4].mean()  # it learns
    assert float(((half - exact) / exact).abs().max()) < band
