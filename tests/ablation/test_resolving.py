"""Every study that ships can be trained as it stands, the paper's with the published sizes; impossible ones cannot."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from tiny import node, run_config, text_config
from tiny_runs import diffusion_config, write_run

from ldm.ablation.resolve import Resolved, check_ready, resolve
from ldm.ablation.run import first_stage_evaluation, sample_evaluations, share, step_names
from ldm.ablation.study import Study, read
from ldm.errors import UserError

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "ablation"
FACTORS = (1, 2, 4, 8, 16, 32)
SIZES = {  # counted from the hyperparameters of Tables 13 and 14, with 16 channels at f = 32
    "imagenet_f": (396_835_971, 390_888_578, 400_920_579, 394_984_196, 395_002_632, 395_039_504),
    "celebahq_f": (270_458_115, 264_510_722, 274_056_163, 257_733_124, 257_751_560, 257_788_432),
}
JOBS = {  # first stages and their figures, latent trainings (with a short one before), evaluations on the way and last
    "toy_f": 5 * 2 + 6 * (2 + 3 + 4),
    "toy_f_emoji": 5 * 2 + 6 * (2 + 3 + 4),
    "kl_vs_vq": 4 * 2 + 4 * (1 + 3 + 2),
    "latent_scale": 2 * 2 + 3 + 6,
    "guidance": 2 + 1 + 6,
    "ddim_steps": 2 + 1 + 2 * 7,
    "transformer_depth": 2 + 3 * (1 + 3 + 1),
    # of three seeds each; trials that differ in sampling alone share a training
    "objectives": 2 + 36 * (1 + 1 + 1),
    "backbones": 2 + 9 * (1 + 1 + 2),
    "averages": 2 + 3 * (1 + 6),
    "guidance_kinds": 2 + 3 * (1 + 6),
    "samplers": 2 + 3 * (1 + 28 * 3),
    "samplers_scenes": 2 + 3 * (1 + 28 * 3),
    "samplers_emoji": 2 + 3 * (1 + 28 * 3),
    "alignment": 2 + 6 * (1 + 1 + 1),
    "imagenet_alignment": 6 * (1 + 7 + 2),
    "imagenet_objectives": 36 * (1 + 7 + 3),
    "imagenet_backbones": 9 * (1 + 7 + 3),
    "imagenet_averages": 3 * (1 + 6),
    "imagenet_guidance_kinds": 3 * (1 + 6),
    "imagenet_samplers": 3 * (1 + 42 * 4),
}
SHAPES = [(3, 256, 256), (2, 128, 128), (3, 64, 64), (4, 32, 32), (8, 16, 16), (16, 8, 8)]


@cache
def of_the_paper(name: str) -> list[Resolved]:
    return resolve(read(STUDIES / f"{name}.yaml"))


def all_steps(study: Study, trials: list[Resolved]) -> set[str]:
    return {name for trial in trials for name in step_names(study, trial)}


@pytest.mark.parametrize("name", SIZES)
def test_the_studies_of_the_paper_have_the_published_sizes(name):
    cost = [one.cost for one in of_the_paper(name)]
    assert tuple(one.factor for one in cost) == FACTORS
    assert tuple(one.parameters for one in cost) == SIZES[name]
    assert [one.latent_shape for one in cost] == SHAPES


@pytest.mark.parametrize(("name", "steps"), JOBS.items())
def test_the_other_studies_share_what_their_trials_have_in_common(name, steps):
    study = read(STUDIES / f"{name}.yaml")
    assert len(all_steps(study, resolve(study))) == steps


def test_no_study_is_untested():
    assert {path.stem for path in STUDIES.glob("*.yaml")} == {*SIZES, *JOBS}


def toy(*overrides, f=4, **changes):
    """Take one value of f of the toy study."""
    study = read(STUDIES / "toy_f.yaml").changed(overrides)
    return replace(study, axes={"f": {f: study.axes["f"][f]}}, **changes)


def test_flops_are_those_of_one_picture_of_the_latent_size():
    small, large = (resolve(toy(f=f))[0].cost for f in (4, 2))
    ratio = large.network_flops / small.network_flops
    assert 3.9 < ratio < 4.2  # four times the places; attention and time embedding are small


def test_names_follow_what_is_trained():
    names = [resolve(toy(*overrides))[0].name for overrides in ((), (), ("latent.training.params.ema_decay=0.9",))]
    assert names[0] == names[1] != names[2]
    assert resolve(toy(seeds=(24,)))[0].name != names[0]
    assert resolve(toy(seeds=(24,)))[0].first_stage == resolve(toy())[0].first_stage


def test_names_of_axes_and_values_become_names_of_files():
    values = {
        text: (("latent.training.params.ema_decay", decay),) for text, decay in (("x" * 300, 0.9), ("a/b c", 0.8))
    }
    names = [trial.name for trial in resolve(replace(toy(), axes={**toy().axes, "up/down": values}))]
    assert len(set(names)) == 2 and all("/" not in name and len(name) < 100 for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["first_stage.data.params.train.params.size=30", "latent.data.params.train.params.size=30"], "multiple of 4"),
        (["latent.model.params.network.params.channel_mult=[1, 2, 3, 4, 5]"], "latents of 8x8 .* multiples of 16"),
        (["first_stage.model.params.architecture.params.channel_mult=[1, 1]"], "f=4: .* has f=2"),
        (["latent.model.params.network.params.in_channels=5"], "in_channels is 5.*set in_channels: 3"),
        (["latent.model.params.network.params.model_channel=32"], "did you mean model_channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is(overrides, message):
    with pytest.raises(UserError, match=f"toy_f, f=4: .*{message}"):
        resolve(toy(*overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("frechett",)}, "toy_f, evaluation.metrics: .*frechett: unknown; did you mean frechet"),
        ({"metrics": ("frechet", "kernel")}, "toy_f, evaluation.metrics: kernel: needs 1000 samples or more, .* 500"),
        ({"metrics": ("memorisation_frechet",)}, "toy_f, evaluation.metrics: memorisation_frechet: .* use train"),
        ({"first_stage_metrics": ("kernel",)}, "toy_f, evaluation.first_stage_metrics: kernel: needs 1000"),
        ({"extractor": "inceptoin"}, "toy_f, evaluation.metrics: .*inceptoin: unknown; did you mean inception"),
        ({"steps": (50, 2000)}, "toy_f, f=4: .*steps is 2000; .*1000 steps"),
        ({"curve_steps": 1001}, "toy_f, f=4: .*steps is 1001"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_trained(changes, message):
    study = toy()
    with pytest.raises(UserError, match=message):
        resolve(replace(study, evaluation=replace(study.evaluation, **changes)))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"scale": "big"}, "sample.scale: 'big' is not a number"),
        ({"scale": 3.0}, "sample.scale is 3; .*without conditions"),
        ({"sampler": "nosuch"}, "sampler 'nosuch' is unknown; use one of .*ddim"),
        ({"sampler": "plms", "eta": 1.0}, "plms: has no eta"),
        ({"eta": -1.0}, "sample.eta: -1.0 is not a number, 0 or more"),
        ({"H": 40}, "sample.H is 40; these models need multiples of 16"),
        ({"grid": "nosuch"}, "grid 'nosuch' is unknown; use one of uniform"),
        ({"guidance.rescal": 0.7}, "sample.guidance.rescal: unknown; did you mean rescale"),
        ({"guidance.rescale": 0.7}, "guidance: rescale: no effect at scale 1"),
        ({"weights": "long"}, "sample.weights: there is no average long; use one of ema, raw"),
        ({"scale": 2.0, "guidance.guide": "ema:long"}, "sample.guidance.guide: there is no average long"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_anything_is_trained(sample, message, capsys):
    study = toy()
    with pytest.raises(UserError, match=f"toy_f, f=4: .*{message}"):
        resolve(replace(study, last=tuple((f"sample.{name}", value) for name, value in sample.items())))
    assert capsys.readouterr() == ("", "")


def test_what_is_not_on_this_machine_is_missed_before_a_run_but_not_in_a_dry_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    study = toy()
    check_ready(study, resolve(study))
    study = replace(study, evaluation=replace(study.evaluation, extractor="inception"))
    with pytest.raises(UserError, match="toy_f, evaluation.extractor: inception: "):
        check_ready(study, resolve(study))


def test_what_the_paper_trained_is_missed_before_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = "imagenet_f, f=4: first_stage.checkpoint: models/first_stage_models/vq-f4/model.ckpt: no such checkpoint"
    with pytest.raises(UserError, match=place):
        check_ready(read(STUDIES / "imagenet_f.yaml"), of_the_paper("imagenet_f"))


@pytest.mark.parametrize("package", ["torch_fidelity", "matplotlib"])
def test_a_package_that_is_not_installed_is_missed_before_a_run(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=package.replace("_", "-")):
        check_ready(toy(), [])


@pytest.mark.parametrize("name", SIZES)
def test_first_stages_are_all_judged_by_the_images_of_the_latent_models(name):
    study = read(STUDIES / f"{name}.yaml")
    found = [(trial, first_stage_evaluation(study, trial)) for trial in of_the_paper(name)]
    judged = {evaluation.name for _, evaluation in found if evaluation is not None}
    assert len(judged) == len(FACTORS) - 1
    for trial, evaluation in found:
        names = step_names(study, trial)
        assert evaluation is None or names.index(trial.name) < names.index(evaluation.name)


def test_a_first_stage_is_judged_once_for_each_set_of_images():
    study = read(STUDIES / "toy_f.yaml")
    key = "latent.data.params.validation.params.num_samples"
    counts = {count: ((key, count),) for count in (100, 200)}
    study = replace(study, axes={"f": {4: study.axes["f"][4]}, "images": counts}, seeds=(1, 2))
    first, second, *others = (first_stage_evaluation(study, trial).name for trial in resolve(study))
    assert first != second and others == [first, second]


def test_another_config_starts_afresh():
    other = ("first_stage", (STUDIES / "../demo/autoencoder_shapes.yaml").resolve())
    channels = ("latent.model.params.network.params", {"in_channels": 4, "out_channels": 4})
    changes = {"weights": (("first_stage.checkpoint", "w.ckpt"),), "other": (other, channels)}
    given, afresh = (trial.first_stage for trial in resolve(replace(toy(), axes={**toy().axes, "change": changes})))
    assert given.checkpoint == "w.ckpt" and afresh.checkpoint is None
    options = [stage.content["data"]["params"]["train"]["params"] for stage in (given, afresh)]
    assert options[0]["num_objects"] == [1, 2] and "num_objects" not in options[1]


def test_networks_of_unequal_size_are_refused_where_they_should_be_equal():
    study = read(STUDIES / "toy_f.yaml")
    with pytest.raises(UserError, match="f=4 .*1,856,579.*budget.parameters .*1%"):
        axes = {"f": {f: study.axes["f"][f] for f in (4, 16)}}
        resolve(replace(study, axes=axes, budget=replace(study.budget, parameters=0.01)))


def test_networks_of_unequal_flops_are_refused_where_they_should_be_equal():
    study = read(STUDIES / "toy_f.yaml")
    with pytest.raises(UserError, match=r"not equal in flops: f=8 has [\d,]+, f=4 has .*budget.flops allows 10%"):
        axes = {"f": {f: study.axes["f"][f] for f in (4, 8)}}
        resolve(replace(study, axes=axes, budget=replace(study.budget, flops=0.1)))


# ------------------------------------------------------------------------------------------------- of a trained model


@pytest.fixture
def run(tmp_path) -> Path:
    """Write a run of a tiny model of text to image, as a training leaves it."""
    training = diffusion_config(text_config(), context_dim=8)
    shapes = [node("toy.shapes.Shapes", num_samples=4, size=16, split=split) for split in ("train", "validation")]
    folder = write_run(tmp_path / "run", training)
    (folder / "configs" / "config.yaml").write_text(yaml.safe_dump(run_config(training, *shapes)))
    return folder


def of_run(run, *overrides):
    study = read(STUDIES / "guidance.yaml").changed([f"latent.checkpoint={run}", *overrides])
    return replace(study, evaluation=replace(study.evaluation, steps=(4,), curve_steps=4))


def test_of_a_trained_model_only_samples_are_evaluated_those_of_each_seed(run):
    study = replace(of_run(run), seeds=(1, 2))
    trials = resolve(study)
    assert {trial.cost.latent_shape for trial in trials} == {(4, 8, 8)}  # the model of the run, not that of the study
    names = [name for trial in trials for name in step_names(study, trial)]
    evaluations = [one.name for trial in trials for one in sample_evaluations(study, trial)]
    assert names == evaluations and len(set(names)) == 2 * 6
    assert trials[0].content["data"]["params"]["validation"]["params"]["num_samples"] == 500


def test_what_a_trained_model_has_already_is_no_axis(run):
    study = replace(of_run(run), axes={"decay": {0.9: (("latent.training.params.ema_decay", 0.9),)}})
    with pytest.raises(UserError, match="decay=0.9: axes.decay sets latent.training.params.ema_decay; "):
        resolve(study)


def test_a_trained_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="guidance, scale=1.0: .*absent"):
        resolve(of_run(tmp_path / "absent"))


def test_tasks_of_an_array_share_the_study_out_without_waiting_for_one_another():
    study = read(STUDIES / "kl_vs_vq.yaml")
    trials = resolve(study)
    parts = [all_steps(study, share(trials, task, 3)) for task in range(3)]
    assert set.union(*parts) == all_steps(study, trials)
    assert sum(map(len, parts)) == len(all_steps(study, trials))
    with pytest.raises(UserError, match="0 to 2"):
        share(trials, 3, 3)
