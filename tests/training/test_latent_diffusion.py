import csv
from pathlib import Path

import pytest
import torch
from fitting import fit, largest_difference, loader
from tiny import SIZE, class_diffusion

from ldm.diffusion.objective import Objective, Uncertainty
from ldm.diffusion.prediction import Sample
from ldm.diffusion.times import Stratified
from ldm.errors import UserError
from ldm.training.lightning_fixes.checkpoints import Checkpoints
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.lr_schedules import WarmUpLinear
from ldm.training.optimization import Optimization
from ldm.training.randomness import Draws
from ldm.weights.load import load_into


@pytest.fixture
def batch() -> dict:
    return next(iter(loader()))


def test_state_dict_has_the_published_layout() -> None:
    keys = list(class_diffusion(latent_scale="measure", objective=Objective(learn_logvar=True)).state_dict())
    tables = [key for key in keys if "." not in key]
    assert set(tables) == {"logvar", "scale_factor", *class_diffusion().model.process.buffers()}
    heads = {key.split(".")[0] for key in keys if "." in key}
    assert heads == {"model", "model_ema", "first_stage_model", "cond_stage_model"}
    assert "model.diffusion_model.time_embed.0.weight" in keys
    assert "model_ema.diffusion_modeltime_embed0weight" in keys
    assert "logvar" not in class_diffusion().state_dict() and "scale_factor" not in class_diffusion().state_dict()


def test_what_an_objective_learns_is_trained_saved_and_no_part_of_the_model(tmp_path: Path) -> None:
    objective = Objective(uncertainty=Uncertainty(8), times=Stratified(strata=4), offset_noise=0.1, space=Sample())
    training = class_diffusion(objective=objective)
    before = training.objective.uncertainty.weight.detach().clone()
    fit(training, tmp_path, 3, callbacks=[Checkpoints(tmp_path)])
    assert not torch.equal(training.objective.uncertainty.weight, before)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state["uncertainty.weight"], training.objective.uncertainty.weight.detach())
    report = load_into(class_diffusion().model, training.state_dict())
    assert not report.missing and not report.unexpected


def test_first_stage_stays_frozen_and_in_eval_mode() -> None:
    training = class_diffusion().train()
    first_stage = training.model.first_stage_model
    assert not first_stage.training and training.model.model.training
    frozen = {id(p) for p in first_stage.parameters()}
    assert not frozen & {id(p) for p in training.optimized_parameters()}
    assert all(not p.requires_grad for p in first_stage.parameters())


def test_latents_are_scaled_going_in_and_coming_out(batch: dict) -> None:
    plain, scaled = class_diffusion().model, class_diffusion(latent_scale=0.25).model
    noise = torch.randn(2, 2, SIZE // 2, SIZE // 2)
    z = plain.encode(batch["image"], lambda shape: noise)
    torch.testing.assert_close(scaled.encode(batch["image"], lambda shape: noise), 0.25 * z)
    torch.testing.assert_close(scaled.decode(0.25 * z), plain.decode(z))


def test_cached_moments_give_the_same_latents(batch: dict) -> None:
    model = class_diffusion(latent_scale=0.5).model
    moments = model.first_stage_model.moments(batch["image"])
    noise = torch.randn(2, 2, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(
        model.latents({"moments": moments}, lambda shape: noise), model.latents(batch, lambda shape: noise)
    )
    with pytest.raises(UserError, match="no 'image'.*caption"):
        model.latents({"caption": ["a"]})


def test_perfect_network_has_zero_loss_and_wrong_one_has_the_mean_square(batch: dict) -> None:
    training = class_diffusion(ema_decay=None, objective=Objective("l2"))
    model, objective = training.model, training.objective
    torch.nn.init.zeros_(model.model.diffusion_model.out[-1].weight)
    torch.nn.init.zeros_(model.model.diffusion_model.out[-1].bias)
    z, t, noise = torch.randn(2, 2, 4, 4), torch.tensor([0, 19]), torch.randn(2, 2, 4, 4)
    terms = model.loss(z, model.condition(batch), t, noise, objective)
    torch.testing.assert_close(terms.loss, noise.square().mean())
    torch.testing.assert_close(training.logs(terms)["loss_simple"], terms.loss)
    assert float(model.loss(z, model.condition(batch), t, torch.zeros_like(noise), objective).loss) == 0


def test_guidance_of_scale_one_is_the_conditional_prediction(batch: dict) -> None:
    model = class_diffusion().model.eval()
    conditioning = model.condition(batch)
    x_t, t = torch.randn(2, 2, 4, 4), torch.tensor([3, 7])
    uncond, cond = model.denoiser(model.cond_stage_model.unconditional(2)), model.denoiser(conditioning)
    guided = model.denoiser(conditioning, 2.5)(x_t, t)
    torch.testing.assert_close(
        guided.eps, uncond(x_t, t).eps + 2.5 * (cond(x_t, t).eps - uncond(x_t, t).eps), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.denoiser(conditioning, 1.0)(x_t, t).eps, cond(x_t, t).eps)


def test_training_draws_depend_on_samples_seen_and_seed_and_repeat(batch: dict) -> None:
    model = class_diffusion()
    first = model.training_step(batch, 0)
    assert model.seen == 2
    assert not torch.equal(first, model.training_step(batch, 0))
    model.seen = 0
    assert torch.equal(first, model.training_step(batch, 0))
    model.seen, model.seed = 0, 5
    assert not torch.equal(first, model.training_step(batch, 0))


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    options = {"optimization": Optimization(schedule=WarmUpLinear(3, 1.0, 1.0, 0.1, 100)), "latent_scale": "measure"}
    whole = class_diffusion(**options)
    fit(whole, tmp_path, 8)
    first = class_diffusion(**options)
    fit(first, tmp_path, 4, callbacks=[Checkpoints(tmp_path)])
    resumed = class_diffusion(seed=9, **options)
    fit(resumed, tmp_path, 8, callbacks=[Checkpoints(tmp_path)], ckpt_path=tmp_path / "last.ckpt")
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0
    assert int(resumed.model_ema.num_updates) == 8
    assert float(resumed.model.scale_factor) == float(first.model.scale_factor) != 1.0


def test_averages_follow_optimiser_steps_not_batches(tmp_path: Path) -> None:
    model = class_diffusion()
    trainer = fit(model, tmp_path, 2, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert int(model.model_ema.num_updates) == 2


def test_each_step_is_logged_once_as_the_mean_over_its_batches(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    fit(class_diffusion(), tmp_path, 3, accumulate_grad_batches=2, logger=MetricsCsv(path))
    with path.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_given_scale_that_does_not_fit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(class_diffusion(latent_scale=100.0), tmp_path, 1)
    assert "standard deviation" in caplog.text


def test_only_what_is_trained_moves(tmp_path: Path) -> None:
    model = class_diffusion()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, tmp_path, 2)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model", "model_ema", "cond_stage_model"}


def test_validation_does_not_change_training_and_logs_quarters(tmp_path: Path) -> None:
    quiet, watched = class_diffusion(), class_diffusion()
    fit(quiet, tmp_path, 4)
    logger = MetricsCsv(tmp_path / "metrics.csv")
    trainer = fit(watched, tmp_path, 4, with_validation=True, val_check_interval=2, logger=logger)
    assert largest_difference(quiet.state_dict(), watched.state_dict()) == 0
    logged = set(trainer.callback_metrics)
    assert {"val/loss_simple", "val/loss_simple_ema", "val/loss_simple_q1", "train/loss_simple", "lr_abs"} <= logged


def test_validation_loss_is_reproducible(tmp_path: Path) -> None:
    values = []
    for _ in range(2):
        trainer = fit(class_diffusion(), tmp_path, 1, with_validation=True, val_check_interval=1)
        values.append(float(trainer.callback_metrics["val/loss_simple"]))
    assert values[0] == values[1]


def test_dropped_conditions_follow_the_rate() -> None:
    conditioner = class_diffusion().model.cond_stage_model
    rate = conditioner.draw_drop(4000, Draws.keyed(torch.device("cpu"), 0).uniform).float().mean()
    assert abs(float(rate) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
