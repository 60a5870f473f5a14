"""What every process, prediction, density, weighting and grid must do; they are found in ldm.diffusion.

A new one needs an example here if it cannot be made without arguments.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch

import ldm.diffusion
from ldm.diffusion.cosine import Cosine
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.process import ContinuousProcess, Shifted
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError

PROTOCOLS = {"Process", "Prediction", "TimeDensity", "Weighting", "Grid"}
EXAMPLES = {
    DiscreteVP: [
        DiscreteVP.linear(1000, 0.00085, 0.012),
        DiscreteVP.cosine(50),
        DiscreteVP.linear(1000, 0.00085, 0.012, zero_terminal_snr=True),
    ],
    Shifted: [Shifted(RectifiedFlow(), 3.0), Shifted(DiscreteVP.cosine(1000), 2.0)],
}


def having(*methods):
    """Find the public classes of ldm.diffusion that have these methods."""
    for info in pkgutil.iter_modules(ldm.diffusion.__path__, "ldm.diffusion."):
        module = importlib.import_module(info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            is_own = cls.__module__ == module.__name__ and name not in PROTOCOLS and not name.startswith("_")
            if is_own and all(hasattr(cls, method) for method in methods):
                yield cls


def made(classes):
    return [one for cls in classes for one in EXAMPLES.get(cls) or [cls()]]


def named(value):
    return type(value).__name__


PROCESSES = made(cls for cls in having("level", "from_uniform", "from_log_snr") if cls is not ContinuousProcess)
PREDICTIONS = made(having("inputs", "target", "denoised"))
DENSITIES = made(cls for cls in having("check", "__call__") if not issubclass(cls, torch.nn.Module))
GRIDS = made(cls for cls in having("__call__") if cls.__module__ == "ldm.diffusion.grids")
WEIGHTINGS = made(cls for cls in having("__call__") if cls.__module__ == "ldm.diffusion.weighting")

each_process = pytest.mark.parametrize("process", PROCESSES, ids=named)


def test_they_are_found():
    found = {named(one) for one in (*PROCESSES, *PREDICTIONS, *DENSITIES, *GRIDS, *WEIGHTINGS)}
    assert {"DiscreteVP", "Cosine", "RectifiedFlow", "EDM", "Shifted"} <= found
    assert {"Epsilon", "Sample", "Velocity", "Flow", "Preconditioned"} <= found
    assert {"Uniform", "LogitNormal", "LogNormal", "LogSNR", "Karras", "Compvis", "Unit", "MinSNR"} <= found


def times(process, count=33):
    """Return times inside of the range, float64."""
    u = torch.linspace(0, 1 - 1e-6, count, dtype=torch.float64)
    return process.from_uniform(u).double().clamp(process.cleanest, process.noisiest)


@each_process
def test_noise_grows_with_time_and_clean_data_has_none(process):
    level = process.level(times(process))
    ratio = (level.sigma / (level.alpha + level.sigma)).flatten()
    assert (ratio.diff() > 0).all()
    clean = process.level(torch.tensor([process.clean], dtype=torch.float64))
    assert clean.sigma.item() == 0 and clean.alpha.item() == 1
    assert level.alpha.shape == level.sigma.shape == (33, 1, 1, 1) and level.time.shape == (33,)


@each_process
def test_log_snr_leads_back_to_the_time(process):
    t = times(process)[1:-1]
    t = t[process.level(t).alpha.flatten() > 0]
    back = process.from_log_snr(process.level(t).log_snr.flatten())
    torch.testing.assert_close(back, t, rtol=1e-4, atol=1e-6 * process.noisiest)


@each_process
def test_uniforms_cover_the_range_in_order(process):
    t = process.from_uniform(torch.linspace(0, 1 - 2**-24, 1000)).double()
    assert (t.diff() >= 0).all() and t.min() >= process.cleanest - 1e-6 and t.max() <= process.noisiest + 1e-6


@each_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_have_the_precision_of_their_times(process, dtype):
    level = process.level(times(process).to(dtype))
    assert level.alpha.dtype == level.sigma.dtype == dtype
    exact = process.level(times(process))
    torch.testing.assert_close(level.alpha.double(), exact.alpha, rtol=1e-4, atol=1e-5)


@each_process
def test_tables_rebuild_the_process(process):
    again = process.with_buffers({name: table.clone() for name, table in process.buffers().items()})
    assert torch.equal(again.level(times(process)).sigma, process.level(times(process)).sigma)


@each_process
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_the_exact_output_gives_back_data_and_noise(process, prediction):
    """All pairs of prediction and process give the same (x_0, eps) from the same ideal network."""
    t = times(process)[1:-1]
    level = process.level(t)
    t = t[(level.alpha > 1e-3).flatten()]
    level = process.level(t)
    x0, eps = torch.randn(2, len(t), 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = prediction.denoised(prediction.target(x0, eps, level), level.diffuse(x0, eps), level)
    torch.testing.assert_close(found.x0, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.eps, eps, atol=1e-5, rtol=1e-5)


@each_process
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_any_output_belongs_to_x_t_and_inputs_have_about_unit_variance(process, prediction):
    t = times(process)[1:-1]
    level = process.level(t)
    keep = ((level.alpha > 1e-3) & (level.sigma > 1e-3)).flatten()
    level = process.level(t[keep])
    generator = torch.Generator().manual_seed(2)
    x0, eps, output = torch.randn(3, int(keep.sum()), 4, 8, 8, generator=generator, dtype=torch.float64)
    data = 0.5 * x0
    x_t = level.diffuse(data, eps)
    found = prediction.denoised(output, x_t, level)
    torch.testing.assert_close(level.diffuse(found.x0, found.eps), x_t, atol=1e-6, rtol=1e-5)
    seen, time = prediction.inputs(x_t, level)
    assert 0.2 < seen.std() < 1.5 and time.shape == (len(seen),) and time.isfinite().all()
    assert (prediction.eps_error(level) >= 0).all()


@each_process
@pytest.mark.parametrize("density", DENSITIES, ids=named)
def test_densities_give_times_of_the_process_in_order(process, density):
    u = torch.linspace(0, 1 - 2**-24, 500)
    t = density(u, process).double()
    assert (t.diff() >= -1e-6).all() and t.min() >= process.cleanest - 1e-6 and t.max() <= process.noisiest + 1e-6
    assert process.level(t).sigma.isfinite().all()


@each_process
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=named)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_weights_are_finite_and_not_negative(process, weighting, prediction):
    level = process.level(times(process)[1:-1])
    level = process.level(times(process)[1:-1][(level.alpha > 0).flatten()])
    weights = weighting(level, prediction)
    assert weights.shape == (len(level.time),) and weights.isfinite().all() and (weights >= 0).all()


@each_process
@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_fall_from_noise_to_data_or_refuse_the_process(process, grid, steps):
    try:
        t = grid(process, steps)
    except UserError as error:
        assert process.num_steps is None and named(process) in str(error)
        return
    assert t.dtype == torch.float64 and len(t) >= steps  # compvis merges two steps where T divides by S
    assert (t.diff() <= 0).all() and t[0] <= process.noisiest and t[-1] >= process.clean
    assert t[:-1].min() >= process.cleanest - 1e-9


@each_process
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_impossible_numbers_of_steps_are_refused(process, grid):
    with pytest.raises(UserError, match="steps is 0|counts whole steps"):
        grid(process, 0)
    if process.num_steps is not None:
        with pytest.raises(UserError, match=f"use 1 to {process.num_steps}"):
            grid(process, process.num_steps + 1)


def test_shift_is_the_formula_of_rectified_flow():
    """t' = s t / (1 + (s - 1) t), Esser et al., eq. 23."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(Shifted(RectifiedFlow(), 3.0).level(t).sigma.flatten(), 3 * t / (1 + 2 * t))


def test_shift_moves_the_log_snr():
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    plain, shifted = Cosine().level(t).log_snr, Shifted(Cosine(), 2.0).level(t).log_snr
    torch.testing.assert_close(shifted, plain - 2 * torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_the_prior_has_the_spread_of_the_noisiest_level():
    assert EDM(noisiest=20.0).prior_std == 20.0 and RectifiedFlow().prior_std == 1.0
