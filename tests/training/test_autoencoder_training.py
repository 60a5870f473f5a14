from pathlib import Path

import pytest
import torch
from fitting import fit, largest_difference, loader
from tiny import SIZE, autoencoder, autoencoder_training
from torch import nn

from ldm.errors import UserError
from ldm.evaluation.image_metrics import psnr
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.lightning_fixes.checkpoints import Checkpoints
from ldm.training.randomness import Draws


@pytest.fixture
def x() -> torch.Tensor:
    return next(iter(loader()))["image"]


def gradients(model: AutoencoderTraining, x: torch.Tensor) -> dict[str, torch.Tensor]:
    loss, _, _ = model.losses(x, Draws.keyed(model.device, 0), "train")
    loss.backward()
    return {model.published_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_state_dict_is_flat_as_published() -> None:
    keys = set(autoencoder_training(ema_decay=0.9).state_dict())
    assert set(autoencoder().state_dict()) <= keys
    heads = {key.split(".")[0] for key in keys}
    assert heads == {"encoder", "decoder", "quant_conv", "post_quant_conv", "loss", "model_ema"}
    assert "model_ema.encoderconv_inweight" in keys


def test_each_loss_reaches_only_its_own_parameters(x: torch.Tensor) -> None:
    model = autoencoder_training(disc_start=0)
    together = gradients(model, x)
    assert {id(p) for p in model.generator_parameters()} | {id(p) for p in model.discriminator_parameters()} <= {
        id(p) for name, p in model.named_parameters() if model.published_name(name) in together
    }

    alone = autoencoder_training(disc_start=0)
    reconstruction, _, _ = alone.model(x, Draws.keyed(alone.device, 0).normal)
    alone.loss.discriminator_loss(x, reconstruction.detach(), 0)[0].backward()
    for name, parameter in alone.loss.discriminator.named_parameters():
        torch.testing.assert_close(together[f"loss.discriminator.{name}"], parameter.grad)
    assert all(p.grad is None for p in alone.generator_parameters())

    alone.zero_grad()
    reconstruction, regularization, _ = alone.model(x, Draws.keyed(alone.device, 0).normal)
    alone.loss.generator(x, reconstruction, regularization, 0, alone.model.last_layer)[0].backward()
    for name, parameter in alone.model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad)


def test_autoencoder_does_not_feel_the_discriminator_before_its_start(x: torch.Tensor) -> None:
    without = gradients(autoencoder_training(with_discriminator=False), x)
    early = gradients(autoencoder_training(disc_start=10), x)
    late = gradients(autoencoder_training(disc_start=0), x)
    torch.testing.assert_close(early["encoder.conv_in.weight"], without["encoder.conv_in.weight"])
    assert not torch.allclose(late["encoder.conv_in.weight"], without["encoder.conv_in.weight"])
    assert not any(early[name].any() for name in early if name.startswith("loss.discriminator"))


def test_steps_count_batches_and_both_sides_step_at_each(tmp_path: Path) -> None:
    model = autoencoder_training(disc_start=0)
    before = model.loss.discriminator.main[0].weight.detach().clone()
    trainer = fit(model, tmp_path, 3)
    assert trainer.global_step == 3
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {3}
    assert not torch.equal(model.loss.discriminator.main[0].weight, before)
    assert float(model.loss.logvar.detach()) == 0  # as published: not learned


def test_output_variance_is_learned_when_asked(tmp_path: Path) -> None:
    model = autoencoder_training(learn_logvar=True)
    fit(model, tmp_path, 1)
    assert float(model.loss.logvar.detach()) != 0


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    # Without noise (mode of the posterior) and without the discriminator, whose normalisation sees the whole batch.
    momenta = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        model = autoencoder_training(with_discriminator=False, ema_decay=0.9)
        with torch.no_grad():
            model.model.quant_conv.bias[2:].fill_(-60.0)
            model.model.quant_conv.weight[2:].zero_()
        trainer = fit(model, tmp_path, 1, batch_size=batch_size, accumulate_grad_batches=accumulate)
        state = trainer.optimizers[0].state
        momenta.append(torch.cat([state[parameter]["exp_avg"].flatten() for parameter in model.generator_parameters()]))
        assert trainer.global_step == int(model.model_ema.num_updates) == 1
    torch.testing.assert_close(*momenta, rtol=1e-3, atol=1e-3 * float(momenta[0].abs().max()))


def test_clipping_bounds_each_side_on_its_own(x: torch.Tensor) -> None:
    model = autoencoder_training(disc_start=0)
    model.learning_rate = 1e-3
    gradients(model, x)
    optimizer = model.configure_optimizers()["optimizer"]
    model.configure_gradient_clipping(optimizer, 0.5, "norm")
    for parameters in (model.generator_parameters(), model.discriminator_parameters()):
        assert float(torch.stack([p.grad.norm() for p in parameters]).norm()) <= 0.5 + 1e-4


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole, first, resumed = (autoencoder_training(seed, disc_start=2, ema_decay=0.9) for seed in (0, 0, 1))
    fit(whole, tmp_path, 8)
    fit(first, tmp_path, 4, callbacks=[Checkpoints(tmp_path)])
    fit(resumed, tmp_path, 8, callbacks=[Checkpoints(tmp_path)], ckpt_path=tmp_path / "last.ckpt")
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0


def test_half_precision_stays_close(tmp_path: Path) -> None:
    values = []
    for precision in ("32", "bf16-mixed"):
        trainer = fit(autoencoder_training(disc_start=1), tmp_path, 3, precision=precision, with_validation=True)
        values.append(float(trainer.callback_metrics["train/rec_loss"]))
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_loss_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Identity"):
        fit(AutoencoderTraining(autoencoder(), nn.Identity()), tmp_path, 1)


def test_random_sizes_are_multiples_within_the_range() -> None:
    model = autoencoder_training(resize_range=(32, 64))
    assert model._resized(torch.zeros(1, 3, SIZE, SIZE)).shape[-2:] == (64, 64)  # the first ones are the largest


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x + 0.2, x).tolist() == pytest.approx([20.0, 20.0])  # range 2, error 0.2
