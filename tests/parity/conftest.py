"""Collect one test per recorded case; `--parity-cases DIR` reads other cases than those in the repository."""

from pathlib import Path

import pytest

from .case import case_names

DEFAULT_CASES = Path(__file__).parent / "cases"


def pytest_addoption(parser):
    parser.addoption("--parity-cases", metavar="DIR", default=None, help="folder of recorded parity cases")


def pytest_generate_tests(metafunc):
    if "parity_case" not in metafunc.fixturenames:
        return
    # the option is unknown when the whole suite runs: this file is then read after the command line
    folder = Path(metafunc.config.getoption("parity_cases", default=None) or DEFAULT_CASES)
    if not folder.is_dir():
        raise pytest.UsageError(f"--parity-cases: there is no folder {folder}")
    names = case_names(folder)
    metafunc.parametrize("parity_case", [(folder, name) for name in names], ids=names)
