"""A wheel built from the project carries all of its code and imports from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORT_EVERYTHING = """
import importlib, pkgutil, ldm
names = [module.name for module in pkgutil.walk_packages(ldm.__path__, "ldm.")]
for name in names:
    importlib.import_module(name)
from ldm.config import shipped
print(len(names), ldm.__file__, shipped.find("ldm/ffhq"))
"""


@pytest.mark.slow
def test_wheel_installs_and_imports_from_another_directory(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ldm", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):  # the build leaves files
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    shown = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    count, location, config = shown.split()
    assert int(count) > 30
    assert Path(location).is_relative_to(site) and Path(config).is_relative_to(site)
    assert "base:" in Path(config).read_text()
    for command, flag in (("train", "--base"), ("sample", "--classes")):
        environment = {"PYTHONPATH": str(site), "PATH": ""}
        program = [sys.executable, site / "bin" / "ldm", command, "--help"]
        done = subprocess.run(program, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        assert flag in done.stdout
