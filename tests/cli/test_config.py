"""`ldm config`, and shipped configs by name wherever a file is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ldm.cli import config, program, train
from ldm.config import shipped
from ldm.toy import TEXT_TO_IMAGE


def test_list_names_every_config_with_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(shipped.names()) and {"ldm/ffhq", "demo/txt2img_shapes", "ablation/toy_f"} <= set(lines)


def test_show_prints_the_whole_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["show", "ldm/sit_s", "model.params.network.params.patch_size=4"]) == 0
    params = yaml.safe_load(capsys.readouterr().out)["model"]["params"]["network"]["params"]
    assert (params["hidden_size"], params["patch_size"], params["in_channels"]) == (384, 4, 4)


def test_show_prints_the_config_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["show", str(TEXT_TO_IMAGE), "model.params.latent_scale=2.0"]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["target"].endswith("LatentDiffusion") and model["params"]["latent_scale"] == 2.0


@pytest.mark.parametrize(
    ("words", "named"),
    [(["show"], "name a config"), (["show", "ldm/fhq"], "ldm/ffhq"), (["list", "ldm/ffhq"], "no further words")],
)
def test_mistakes(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.main(words)
    assert named in capsys.readouterr().err


def test_names_are_taken_where_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--base", "demo/autoencoder_shapes", "--dry-run"]) == 0
    assert program.main(["train", "demo/autoencoder_shapes", "--dry-run", "--max_steps", "3"]) == 0
    Path("demo").mkdir()
    Path("demo/autoencoder_shapes").write_text("model: 3")  # a file of one's own goes first
    with pytest.raises(SystemExit):
        train.main(["--base", "demo/autoencoder_shapes", "--dry-run"])


def test_sample_takes_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["sample", "a red circle", "--run", "absent"])
    assert "absent" in capsys.readouterr().err
