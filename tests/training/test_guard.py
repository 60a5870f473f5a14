"""A bad batch changes nothing; many of them end the run."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import Noise, fit
from tiny import autoencoder_training, class_diffusion
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader

from ldm.errors import UserError
from ldm.training.lightning_fixes.guard import StepGuard, skipping
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv

MODELS = {"autoencoder": lambda: autoencoder_training(disc_start=0, ema_decay=0.9), "diffusion": class_diffusion}


@pytest.fixture
def alone() -> Iterator[None]:
    """One process that is a group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimiser_leaves_the_step_out_itself_also_where_state_is_shared(
    alone: None, shares: bool, fused: bool
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    settings = {"lr": 0.1, "fused": fused or None}
    optimizer = (
        ZeroRedundancyOptimizer([weight], torch.optim.AdamW, **settings)
        if shares
        else torch.optim.AdamW([weight], **settings)
    )
    weight.grad = torch.full((3,), float("nan"))
    taking = skipping(optimizer)
    assert (taking is not None) == fused
    if taking is not None:
        taking.found_inf = torch.ones(())
        optimizer.step()
        assert torch.equal(weight.detach(), torch.ones(3))


class Poisoned(Noise):
    """Give a nan in the image of some indices."""

    def __init__(self, bad: set[int], length: int = 8) -> None:
        super().__init__(length)
        self.bad = bad

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index in self.bad:
            item["image"][0, 0, 0] = float("nan")
        return item


class Watch(pl.Callback):
    """Keep everything that a step may change, after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        for number, values in enumerate(trainer.optimizers[0].state.values()):
            state |= {f"{number}.{name}": value.clone() for name, value in values.items()}
        self.states.append(state)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def trained(model: pl.LightningModule, bad: set[int], folder: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, enable_checkpointing=False, log_every_n_steps=1,
        enable_model_summary=False, enable_progress_bar=False, max_epochs=1, logger=MetricsCsv(folder / "metrics.csv"),
        callbacks=[watch], **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Poisoned(bad), 2))
    return watch.states


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_batch_changes_nothing_and_is_counted(name: str, tmp_path: Path) -> None:
    states = trained(MODELS[name](), {2}, tmp_path)  # the second of four batches
    assert equal(states[1], states[0]) and not equal(states[2], states[1])
    assert all(value.isfinite().all() for value in states[3].values())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["skipped_steps"]) for row in rows] == [0, 1, 1, 1]


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_batch_spoils_the_step_that_accumulates_it(name: str, tmp_path: Path) -> None:
    states = trained(MODELS[name](), {0}, tmp_path, accumulate_grad_batches=2)
    before = {key: value for key, value in MODELS[name]().state_dict().items() if "num_updates" not in key}
    assert all(torch.equal(states[1][key], value) for key, value in before.items())
    assert not equal(states[3], states[1])


@pytest.mark.parametrize(("limit", "survives"), [(0, False), (1, False), (2, True)])
def test_too_many_in_a_row_end_the_run(limit: int, survives: bool, tmp_path: Path) -> None:
    model = class_diffusion()
    model.guard = StepGuard(limit)
    bad = {0, 4, 6}  # steps 1, 3 and 4
    if survives:
        assert len(trained(model, bad, tmp_path)) == 4
        return
    with pytest.raises(UserError, match="in a row were not finite"):
        trained(model, bad, tmp_path)


def test_a_loss_that_is_not_finite_is_no_step_even_with_finite_gradients(tmp_path: Path) -> None:
    model = class_diffusion()
    loss = model.model.loss

    def infinite(*args: Any) -> Any:
        terms = loss(*args)
        return terms._replace(loss=terms.loss + float("inf"))

    model.model.loss = infinite
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, tmp_path, 2)
    assert equal(before, dict(model.state_dict())) and int(model.guard.num_skipped) == 2


def test_optimisers_that_cannot_skip_by_themselves_get_no_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    guard = StepGuard()
    for gradient, skipped in ((1.0, 0), (float("inf"), 1), (float("nan"), 2)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        guard.check_gradients(optimizer)
        optimizer.step()
        guard.after_step()
        assert int(guard.num_skipped) == skipped and torch.equal(before, weight) == (skipped > 0)


def test_counts_go_on_after_resuming() -> None:
    guard, resumed = StepGuard(1), StepGuard(1)
    guard.load_state_dict({"skipped": 5, "in_a_row": 1})
    resumed.load_state_dict(guard.state_dict())
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), float("nan"))
    resumed.check_limit()
    resumed.check_gradients(torch.optim.Adam([weight], fused=True))
    resumed.after_step()
    with pytest.raises(UserError, match="2 steps in a row"):
        resumed.check_limit()
    assert resumed.state_dict() == {"skipped": 6, "in_a_row": 2}


@pytest.mark.parametrize("limit", [-1, 1.5, True, "ten"])
def test_impossible_limits_are_refused(limit: Any) -> None:
    with pytest.raises(UserError, match="max_skipped_steps"):
        StepGuard(limit)
