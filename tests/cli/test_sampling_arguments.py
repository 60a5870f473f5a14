"""Arguments that the scripts share, and how mistakes are reported."""

import argparse

import pytest
import torch

from ldm.cli.common import add_sampler_arguments, choose_device, choose_sampler, count_steps, main_guard
from ldm.diffusion.grids import SPACINGS
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.dpm_solver import DPMSolver
from ldm.sampling.plms import PLMS


def chosen(*argv):
    parser = argparse.ArgumentParser()
    add_sampler_arguments(parser, steps=7, eta=1.0, scale=1.0)
    return choose_sampler(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), DDIM(7, 1.0)),
        (("--ddim_eta", "0", "-c", "3", "--spacing", "compvis"), DDIM(3, 0.0, SPACINGS["compvis"])),
        (("--plms", "--ddim_steps", "5"), PLMS(5)),
        (("--sampler", "dpm_solver"), DPMSolver(7)),
        (("--vanilla_sample",), DDPM()),
    ],
)
def test_arguments_choose_the_sampler(argv, expected):
    assert chosen(*argv) == expected


def test_eta_needs_a_sampler_that_has_one():
    with pytest.raises(UserError, match="plms .*eta"):
        chosen("--plms", "--ddim_eta", "0.5")
    assert chosen("--plms", "--ddim_eta", "0") == PLMS(7)
    with pytest.raises(UserError, match="0 .no noise. or more"):
        chosen("--ddim_eta", "-1")


def test_steps_are_counted_as_they_will_be_taken():
    schedule = Schedule.linear(1000)
    assert count_steps(DDIM(400), schedule) == 400
    assert count_steps(DDIM(400, spacing=SPACINGS["compvis"]), schedule) == 500
    assert count_steps(DDPM(), schedule) == 1000
    with pytest.raises(UserError, match="steps is 0"):
        count_steps(DDIM(0), schedule)


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


def test_an_interrupt_is_status_130_and_a_bug_keeps_its_traceback():
    assert run(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda argv=None: 1 / 0)([])
