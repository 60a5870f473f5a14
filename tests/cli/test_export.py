from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from ldm.cli.export import main
from ldm.weights import files as storage
from ldm.weights.load import read


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run whose checkpoint refers to frozen parts under two names."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    (tmp_path / "run" / "configs" / "config.yaml").write_text("model: {target: a}\n")
    frozen = torch.ones(2)
    state = {"model.x": torch.zeros(3), "model_ema.x": torch.full((3,), 5.0), "first.x": frozen, "second.x": frozen}
    content = {"state_dict": state}
    storage.FrozenParts(folder, ["first.x", "second.x"]).take_out(content)
    storage.write(content, folder / "last.ckpt")
    return tmp_path / "run"


def test_export_is_one_file_with_all_weights_and_the_config(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["--run", str(run), "--out", str(out)]) == 0
    assert {name: tuple(value.shape) for name, value in read(out).items()} == {
        "model.x": (3,), "model_ema.x": (3,), "first.x": (2,), "second.x": (2,),
    }  # fmt: skip
    with safe_open(out, "pt") as file:
        assert yaml.safe_load(file.metadata()["config"]) == {"model": {"target": "a"}}


def test_export_of_averages_in_half_precision(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["--run", str(run), "--out", str(out), "--ema", "--half"]) == 0
    state = read(out)
    assert state.keys() == {"model.x", "first.x", "second.x"} and state["model.x"].dtype == torch.float16
    assert torch.equal(state["model.x"], torch.full((3,), 5.0, dtype=torch.float16))


def test_a_mistake_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for absent, words in (
        ("absent", ["--run", str(tmp_path / "absent"), "--out", str(tmp_path / "a.safetensors")]),
        ("a.safetensors", ["--run", str(run), "--out", str(run / "configs" / "config.yaml" / "a.safetensors")]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capsys.readouterr().err
        assert caught.value.code == 1
        assert said.count("\n") == said.count("error: ") == 1 and absent in said
