import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.training.ema import ExponentialMovingAverage


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_names_are_parameter_names_without_dots_and_buffers_stay_out() -> None:
    assert set(ExponentialMovingAverage(model()).state_dict()) == {
        "decay", "num_updates", "0weight", "0bias", "1weight", "1bias",
    }  # fmt: skip


def test_frozen_parameters_are_not_averaged() -> None:
    net = model()
    net[0].requires_grad_(False)
    assert "0weight" not in ExponentialMovingAverage(net).state_dict()


@pytest.mark.parametrize("warmup", [True, False])
def test_update_is_the_published_recursion(warmup: bool) -> None:
    net = model()
    average = ExponentialMovingAverage(net, decay=0.5, warmup=warmup)
    expected = net[0].weight.detach().clone()
    for n in range(1, 9):
        with torch.no_grad():
            net[0].weight.add_(n)
        average.update(net)
        decay = min(0.5, (1 + n) / (10 + n)) if warmup else 0.5
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(average.state_dict()["0weight"], expected)
    assert int(average.num_updates) == (8 if warmup else -1)


def test_constant_weights_are_a_fixed_point() -> None:
    net = model()
    average = ExponentialMovingAverage(net)
    average.update(net)
    assert torch.equal(average.state_dict()["0weight"], net[0].weight)


def test_raw_weights_come_back_even_after_an_error() -> None:
    net = model()
    average = ExponentialMovingAverage(net)
    raw = net[0].weight.detach().clone()
    with torch.no_grad():
        average.get_buffer("0weight").zero_()
    with pytest.raises(RuntimeError), average.applied_to(net):
        assert not net[0].weight.any()
        raise RuntimeError
    assert torch.equal(net[0].weight, raw)


def test_average_is_float32_for_half_precision_weights() -> None:
    average = ExponentialMovingAverage(model().bfloat16())
    assert average.get_buffer("0weight").dtype == torch.float32


def test_loaded_counter_decides_about_warming_up() -> None:
    net = model()
    average = ExponentialMovingAverage(net, decay=0.9, warmup=True)
    average.load_state_dict(ExponentialMovingAverage(net, decay=0.9, warmup=False).state_dict())
    average.update(net)
    assert int(average.num_updates) == -1


def test_colliding_names_and_impossible_decays_are_refused() -> None:
    net = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(1, 1)}), "ab": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="abweight"):
        ExponentialMovingAverage(net)
    with pytest.raises(UserError, match="between 0 and 1"):
        ExponentialMovingAverage(model(), decay=1.5)
