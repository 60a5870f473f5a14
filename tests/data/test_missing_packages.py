"""Readers that need a package which is not installed say which; in processes that cannot import it."""

import subprocess
import sys

import pytest

CASES = {
    "lmdb": "open(root / 'data.mdb', 'wb').close(); from ldm.data.readers.lsun import LSUN; LSUN(root, 8)",
    "pyarrow": "open(root / 'a.parquet', 'wb').close(); from ldm.data.readers.parquet import Parquet; Parquet(root, 8)",
    "tifffile": (
        "from PIL import Image; page = Image.new('L', (4, 4));"
        "page.save(root / 'a.tif', save_all=True, append_images=[page]);"
        "from ldm.data.readers.folders import ImageFolder; ImageFolder(root, 4, channels=2)[0]"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", CASES)
def test_a_missing_package_is_named_with_its_extra(tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom pathlib import Path; root = Path({str(tmp_path)!r})\n"
    result = subprocess.run([sys.executable, "-c", code + CASES[package]], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"needs the package {package} (extra `data`): pip install {package}" in result.stderr.splitlines()[-1]
