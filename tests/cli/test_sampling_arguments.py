"""Arguments that the scripts share, and how mistakes are reported."""

import sys

import pytest
import torch

from ldm.cli.entry import main_guard
from ldm.cli.options import Defaults, SamplingParser, choose_device
from ldm.diffusion.grids import grid_names
from ldm.errors import UserError
from ldm.models.guidance import Guidance
from ldm.models.loading import ModelSource
from ldm.sampling import sampler_class, sampler_names
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.dpm_solver import DPMSolver
from ldm.sampling.plms import PLMS


def chosen(*argv):
    return parsed(*argv)[1].sampler


def parsed(*argv):
    return SamplingParser("task", "A task.", Defaults("out", steps=7, eta=1.0)).parse(["--device", "cpu", *argv])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), DDIM(7, 1.0)),
        (("--ddim_eta", "0", "-c", "3", "--spacing", "compvis"), DDIM(3, 0.0, "compvis")),
        (("--plms", "--ddim_steps", "5"), PLMS(5)),
        (("--sampler", "dpm_solver"), DPMSolver(7)),
        (("--vanilla_sample",), DDPM()),
    ],
)
def test_arguments_choose_the_sampler(argv, expected):
    assert chosen(*argv) == expected


def test_steps_that_have_no_effect_are_told(caplog):
    assert chosen("-v") == DDPM() and not caplog.messages
    assert chosen("-v", "-c", "50") == DDPM()
    (line,) = caplog.messages
    assert "--steps 50: ddpm takes all training steps" in line and "ddpm:steps=50" in line


def test_eta_needs_a_sampler_that_has_one():
    with pytest.raises(UserError, match="plms .*eta"):
        chosen("--plms", "--ddim_eta", "0.5")
    assert chosen("--plms", "--ddim_eta", "0") == PLMS(7)
    with pytest.raises(UserError, match="0 .no noise. or more"):
        chosen("--ddim_eta", "-1")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--sampler", "heun:steps=3"), "steps has a flag of its own"),
        (("--sampler", "ddim:grid=karras"), "grid has a flag of its own"),
        (("--sampler", "ddim:eta=0.5", "--eta", "0.3"), "eta has a flag of its own"),
        (("--sampler", "heun:s_churn=1,s_churn=2"), "s_churn is given twice"),
        (("--device", "meta"), "--device meta: not usable"),
    ],
)
def test_what_is_said_twice_or_cannot_be_used_is_refused(argv, said):
    with pytest.raises(UserError, match=said):
        chosen(*argv) if "--device" not in argv else choose_device(argv[1])


@pytest.mark.parametrize("name", sampler_names())
def test_every_sampler_can_be_chosen_with_the_grid_of_its_own(name):
    sampler = chosen("--sampler", name)
    assert isinstance(sampler, sampler_class(name)) and sampler.grid is None


@pytest.mark.parametrize("flag", ["--grid", "--spacing"])
@pytest.mark.parametrize("name", grid_names())
def test_every_grid_can_be_chosen(flag, name):
    assert chosen(flag, name).grid == name


def test_shared_arguments_become_values():
    words = "--run logs/a --raw --scale 3 --H 64 --tile -n 5 model.params.x=1"
    given, options = parsed(*words.split())
    assert (given.n_samples, given.overrides) == (5, ["model.params.x=1"])
    assert (options.model.source.run, options.model.source.weights, options.model.tile) == ("logs/a", "raw", 0)
    assert (options.guidance, options.size, options.seed) == (Guidance(3.0), (64, None), 42)
    assert options.outdir == "out"
    assert options.has_grid and options.batch_size is None and options.model.device == torch.device("cpu")


def test_guidance_becomes_one_value():
    words = "--run logs/a --scale 3 --guidance interval=0.2:0.8 apg_eta=0 --guide logs/b/checkpoints/early.ckpt"
    found = parsed(*words.split())[1].guidance
    assert found == Guidance(3.0, (0.2, 0.8), apg_eta=0.0, guide=ModelSource("logs/b/checkpoints/early.ckpt"))
    found = parsed(*"--run logs/a --raw --scale 2 --guide ema:slow".split())[1].guidance
    assert found.guide == ModelSource("logs/a", weights="slow")
    with pytest.raises(UserError, match="interval.*START:STOP"):
        parsed("--scale", "3", "--guidance", "interval=0.9:0.2")


def test_options_of_a_sampler_follow_its_name():
    assert chosen("--sampler", "dpm_solver:order=3") == DPMSolver(7, order=3)
    assert chosen("--sampler", "ddpm:steps=9") == DDPM(9)
    with pytest.raises(UserError, match="sampler 'dpm' is unknown; use one of .*dpm_solver"):
        chosen("--sampler", "dpm")
    with pytest.raises(UserError, match="heun.*no churn.*s_churn"):
        chosen("--sampler", "heun:churn=3")


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert (choose_device("auto").type == "cpu") != torch.accelerator.is_available()
    with pytest.raises(UserError, match="--device cpux: "):
        choose_device("cpux")


def run(error):
    @main_guard
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as caught:
        main([])
    return caught.value.code


def test_mistakes_are_one_line_and_status_1(capsys):
    assert run(UserError("a thing:\nis wrong")) == 1
    assert capsys.readouterr().err == "error: a thing: is wrong\n"


def test_a_lost_stderr_ends_nothing(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        for stream in (full, None):
            monkeypatch.setattr("sys.stderr", stream)
            assert main_guard(lambda argv=None: (print("lost", file=sys.stderr), sys.stderr.flush()))([]) == 0


def test_an_interrupt_is_status_130_and_a_bug_keeps_its_traceback():
    assert run(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda argv=None: 1 / 0)([])
