"""The notebooks of the documentation: they run from nothing, in an empty folder, and keep outputs that are small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_two_objectives", "sample_and_edit", "train_on_a_folder"]


@each_notebook
def test_outputs_are_kept_and_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(text) < 300_000
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, 1)), "execute all, from the top"
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr)/", text), "paths of a machine"


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [{output.output_type for output in cell.get("outputs", ())} for cell in notebook.cells]
    kept = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert kinds == [{output["output_type"] for output in cell.get("outputs", ())} for cell in kept]
