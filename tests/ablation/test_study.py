"""Studies are read strictly, and expand to every combination of their axes."""

from pathlib import Path

import pytest
import yaml

from ldm.ablation.study import read
from ldm.errors import ConfigError, UserError

STUDY = {
    "title": "a study",
    "first_stage": "first.yaml",
    "latent": "latent.yaml",
    "set": {"latent.model.params.ema_decay": 0.9},
    "axes": {
        "f": {1: {"first_stage": "none"}, 4: {"latent.model.params.ema_decay": 0.5}},
        "scale": {"key": "sample.scale", "values": [1.0, 3.0]},
    },
    "seeds": [1, 2],
    "budget": {"steps": 10},
    "evaluation": {"metrics": ["frechet"], "extractor": "scenenet", "num_samples": 4},
}

CLAIM = {"says": "pixels are slow", "metric": "frechet", "better": {"f": 4}, "worse": {"f": 1}}


def written(folder: Path, **changes) -> Path:
    for name in ("first.yaml", "latent.yaml"):
        (folder / name).write_text("model: {}\n")
    path = folder / "study.yaml"
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_combination_of_axes_and_seeds_is_a_trial(tmp_path):
    trials = list(read(written(tmp_path)).trials())
    expected = [(f, scale, seed) for seed in (1, 2) for f in (1, 4) for scale in (1.0, 3.0)]
    assert [(trial.labels["f"], trial.labels["scale"], trial.seed) for trial in trials] == expected
    assert str(trials[0]) == "f=1, scale=1.0"
    assert read(written(tmp_path, claims=[CLAIM])).claims[0].better == {"f": 4}


def test_an_axis_is_laid_over_the_study_and_the_command_line_over_both(tmp_path):
    study = read(written(tmp_path)).changed(["latent.model.params.ema_decay=0.7", "latent.model.a=[1, 2]"])
    pixels, _, latent, guided = (trial.settings for trial in list(study.trials())[:4])
    first, key = ("first_stage", tmp_path / "first.yaml"), "latent.model.params.ema_decay"
    base, last = (first, ("latent", tmp_path / "latent.yaml"), (key, 0.9)), ((key, 0.7), ("latent.model.a", [1, 2]))
    assert set(base[:2]) == set(pixels[:2])
    assert pixels[2:] == ((key, 0.9), ("first_stage", "none"), ("sample.scale", 1.0), *last)
    assert latent[2:] == ((key, 0.9), (key, 0.5), ("sample.scale", 1.0), *last)
    assert guided[2:] == ((key, 0.9), (key, 0.5), ("sample.scale", 3.0), *last)


def test_values_of_an_axis_may_be_lists_and_mappings(tmp_path):
    values = [[1, 2], [1, 2, 2], {"target": "x"}, None]
    study = read(written(tmp_path, axes={"m": {"key": "latent.model.m", "values": values}}, seeds=[1]))
    assert [trial.labels["m"] for trial in study.trials()] == ["[1, 2]", "[1, 2, 2]", "{'target': 'x'}", None]
    assert [trial.settings[-1] for trial in study.trials()] == [("latent.model.m", value) for value in values]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "titel: unknown; did you mean title"),
        ({"axes": None}, "axes missing"),
        ({"axes": {}}, "axes: name at least one"),
        ({"axes": {"f": {}}}, "axes.f: name at least one"),
        ({"axes": {"f": [1, 2]}}, r"axes.f: \[1, 2\] is not a dict"),
        ({"axes": {"f": {"key": "model.x", "values": [1]}}}, "f.key.model.x: unknown; begin with first_stage.model"),
        ({"axes": {"f": {"key": "latent.data.x", "values": [1, 1]}}}, "axes.f.values: .*different"),
        ({"axes": {"f": {4: {"latents.data.x": 1}}}}, "axes.f.4.latents.data.x: unknown; did you mean latent.data"),
        ({"set": {"latent.weights": "x.ckpt"}}, "set.latent.weights: unknown"),
        ({"set": {"latent.modle.x": 1}}, "modle.x: unknown; did you mean latent.model"),
        ({"set": ["latent.data.x"]}, "set: .*latent.data.x.* is not a dict"),
        ({"latent": "none"}, "latent: there is no none"),
        ({"axes": {"s": {"key": "sample.scal", "values": [1]}}}, "scal: unknown; did you mean sample.scale"),
        ({"latent": "absent.yaml"}, "latent: there is no absent.yaml"),
        ({"seeds": ["a"]}, r"seeds: \['a'\] is not a list .*whole number"),
        ({"seeds": 3}, "seeds: 3 is not a list"),
        ({"seeds": []}, "seeds: name at least one"),
        ({"seeds": [1, 1]}, "seeds: .*different"),
        ({"budget": {"steps": 10, "minutes": 3}}, "budget: give one of steps, samples, minutes"),
        ({"budget": {"points": 3}}, "budget: give one of steps, samples, minutes"),
        ({"budget": {"minutes": -1}}, "budget.minutes: -1 is not a number, more than 0"),
        ({"budget": {"steps": 10, "parameters": "few"}}, "budget.parameters: 'few' is not a number, 0 or more"),
        ({"budget": {"steps": 10, "parameters": -0.1}}, "budget.parameters: -0.1 is not a number, 0 or more"),
        ({"budget": {"steps": 10, "points": 0}}, "budget.points: 0 is not a whole number, 1 or more"),
        ({"evaluation": {"metrics": ["frechet"]}}, "evaluation: extractor, num_samples missing"),
        ({"evaluation": {**STUDY["evaluation"], "steps": [0]}}, r"evaluation.steps: \[0\] .*1 or more"),
        ({"evaluation": {**STUDY["evaluation"], "steps": []}}, "evaluation.steps: name at least one"),
        ({"workers": 0}, "workers: 0 is not a whole number, 1 or more"),
        ({"claims": {}}, "claims: .* is not a list"),
        ({"claims": [{**CLAIM, "say": "x"}]}, "claims.0.say: unknown; did you mean says"),
        ({"claims": [{**CLAIM, "better": {"g": 1}}]}, "claims.0.better.g: unknown; known are f, scale"),
        ({"claims": [{**CLAIM, "worse": {"f": 2}}]}, "claims.0.worse.f: the axis has no value 2; it has 1, 4"),
        ({"claims": [{**CLAIM, "steps": 7}]}, "claims.0.steps: 7 is none of evaluation.steps"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(written(tmp_path, **changes))
    assert "study.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read_and_an_override_of_nothing(tmp_path):
    with pytest.raises(UserError, match="absent.yaml: "):
        read(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="data.x: unknown; begin with first_stage"):
        read(written(tmp_path)).changed(["data.x=1"])
    with pytest.raises(UserError, match="'latent' is no override"):
        read(written(tmp_path)).changed(["latent"])
    with pytest.raises(UserError, match="max_steps: the budget of the study says how long"):
        read(written(tmp_path)).changed(["latent.lightning.trainer.max_steps=9"])
    study = read(Path(__file__).parents[2] / "configs" / "ablation" / "objectives.yaml")
    with pytest.raises(UserError, match="makes all values of the axis 'weighting' the same"):
        study.changed(["latent.training.params.objective.params.weighting={target: a.b}"])
    assert study.changed(["latent.model.params.prediction={target: a.b}"])  # the processes still differ
