"""Power-function averages: their profile, agreement with ema-pytorch, and lengths that are made afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.training.ema import PowerFunctionAverage
from ldm.weights.post_hoc import (
    Profile,
    coefficients,
    error,
    find_snapshots,
    gamma_of,
    reconstruct,
    write_snapshot,
)

KEPT = {"short": 0.05, "long": 0.1}


def walk(
    folder: Path, steps: int, every: int, extra: float, run: str = "run"
) -> tuple[PowerFunctionAverage, nn.Module]:
    """Move a weight of 500 entries at random; write snapshots, and return an average of another length."""
    torch.manual_seed(0)
    model = nn.Linear(500, 1, bias=False)
    averages = {name: PowerFunctionAverage(model, sigma) for name, sigma in KEPT.items()}
    other = PowerFunctionAverage(model, extra)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight) / steps**0.5
        for average in (*averages.values(), other):
            average.update(model)
        if step % every == 0:
            content = {name: average.named_averages() for name, average in averages.items()}
            write_snapshot(folder, step, content, {name: a.profile for name, a in averages.items()}, run)
    return other, model


def test_gamma_is_that_of_the_paper() -> None:
    assert [gamma_of(0.05), gamma_of(0.1)] == pytest.approx([16.972198602, 6.937203938], abs=1e-8)
    gamma = gamma_of(0.12)  # equation 126 the other way round
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(0.12)


def test_coefficients_are_those_of_ema_pytorch() -> None:
    reference = pytest.importorskip("ema_pytorch.post_hoc_ema")
    kept = [Profile(steps, sigma) for steps in range(100, 1100, 100) for sigma in KEPT.values()]
    for target in (Profile(1000, 0.03), Profile(1000, 0.2), Profile(750, 0.07)):
        columns = [torch.tensor([float(value) for value in part]) for part in zip(
            *((profile.steps, gamma_of(profile.sigma_rel)) for profile in kept), strict=True)]  # fmt: skip
        aim = torch.tensor([float(target.steps)]), torch.tensor([gamma_of(target.sigma_rel)], dtype=torch.float64)
        steps, gammas = columns[0], torch.tensor([gamma_of(p.sigma_rel) for p in kept], dtype=torch.float64)
        expected = reference.solve_weights(steps, gammas, *aim).flatten().numpy()
        np.testing.assert_allclose(coefficients(kept, target), expected, rtol=0, atol=1e-8)


def test_a_kept_profile_is_itself() -> None:
    kept = [Profile(500, 0.05), Profile(1000, 0.05), Profile(1000, 0.1)]
    np.testing.assert_allclose(coefficients(kept, kept[1]), [0, 1, 0], rtol=0, atol=1e-9)
    assert error(kept, kept[1]) < 1e-6 < error(kept, Profile(1000, 0.2))


def test_an_average_weighs_each_step_by_the_power_function() -> None:
    model = nn.Linear(200, 1, bias=False)
    average = PowerFunctionAverage(model, 0.1)
    for step in range(200):  # entry s is 1 from step s on, so that its average is the weight of all steps from s
        with torch.no_grad():
            model.weight.copy_((torch.arange(200) <= step).float()[None])
        average.update(model)
    share = 1 - (torch.arange(200) / 200) ** (gamma_of(0.1) + 1)
    torch.testing.assert_close(average.named_averages()["weight"][0], share, atol=0.02, rtol=0)
    assert average.named_averages()["weight"][0, 0] == 1


def test_a_length_that_was_also_kept_is_reconstructed(tmp_path: Path) -> None:
    kept, model = walk(tmp_path, 1000, 50, extra=0.15)
    made = reconstruct(find_snapshots(tmp_path), Profile(1000, 0.15))["weight"]
    wanted = kept.named_averages()["weight"]
    assert (made - wanted).norm() < 0.01 * (model.weight - wanted).norm()


def test_what_no_combination_of_snapshots_comes_near_is_refused(tmp_path: Path) -> None:
    walk(tmp_path, 1000, 100, extra=0.15)
    snapshots = find_snapshots(tmp_path)
    with pytest.raises(UserError, match="step 950 come no nearer than .*step 900 has one|step 1000 has one"):
        reconstruct(snapshots, Profile(950, 0.05))
    with pytest.raises(UserError, match="sigma_rel 0.001; choose a length nearer"):
        reconstruct(snapshots, Profile(1000, 0.001))
    assert reconstruct(snapshots, Profile(900, 0.05))


def test_a_skipped_step_moves_nothing() -> None:
    model, skipped = nn.Linear(3, 1), torch.tensor(True)
    average = PowerFunctionAverage(model, 0.1)
    before = average.named_averages()["weight"].clone()
    nn.init.zeros_(model.weight)
    average.update(model, skipped)
    assert torch.equal(average.named_averages()["weight"], before) and average.profile.steps == 0
    average.update(model, ~skipped)
    assert not average.named_averages()["weight"].any() and average.profile.steps == 1


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28, 3.0])
def test_lengths_that_there_are_not(sigma_rel: float) -> None:
    with pytest.raises(UserError, match=f"sigma_rel is {sigma_rel:g}"):
        PowerFunctionAverage(nn.Linear(1, 1), sigma_rel)


def test_bad_snapshots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 snapshots"):
        find_snapshots(tmp_path)
    walk(tmp_path, 20, 10, 0.2)
    snapshots = find_snapshots(tmp_path)
    with pytest.raises(UserError, match="step 30 is not between 1 and 20"):
        reconstruct(snapshots, Profile(30, 0.1))
    with pytest.raises(UserError, match="fewer than two snapshots until step 5"):
        reconstruct(snapshots, Profile(5, 0.1))
    walk(tmp_path, 40, 40, 0.2, run="another")
    with pytest.raises(UserError, match="several runs .*step=000000010.*step=000000040"):
        find_snapshots(tmp_path)
    (tmp_path / "step=000000040.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="step=000000040"):
        find_snapshots(tmp_path)
