"""Every study that ships can be trained as it stands, the paper's with the published sizes; impossible ones cannot."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldm.cli.ablation.plan import Programs, plan
from ldm.cli.ablation.resolving import resolve
from ldm.cli.ablation.study import read
from ldm.errors import UserError

STUDIES = Path(__file__).resolve().parents[3] / "configs" / "ablation"
PROGRAMS = Programs(Path("main.py"), Path("scripts/evaluate.py"))
FACTORS = (1, 2, 4, 8, 16, 32)
SIZES = {  # counted from the hyperparameters of Tables 13 and 14, with 16 channels at f = 32
    "imagenet_f": (396_835_971, 390_888_578, 400_920_579, 394_984_196, 395_002_632, 395_039_504),
    "celebahq_f": (270_458_115, 264_510_722, 274_056_163, 257_733_124, 257_751_560, 257_788_432),
}
SHAPES = [(3, 256, 256), (2, 128, 128), (3, 64, 64), (4, 32, 32), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize("name", SIZES)
def test_the_studies_of_the_paper_have_the_published_sizes(name):
    facts = [one.facts for one in resolve(read(STUDIES / f"{name}.yaml"))]
    assert tuple(one.factor for one in facts) == FACTORS
    assert tuple(one.parameters for one in facts) == SIZES[name]
    assert [one.latent_shape for one in facts] == SHAPES


@pytest.mark.parametrize(
    ("name", "jobs"),
    # first stages with their figures, latent trainings with a short one before, judgements on the way and at the end
    [("toy_f", 5 * 2 + 6 * (2 + 3 + 4)), ("toy_f_emoji", 5 * 2 + 6 * (2 + 3 + 4)),
     ("kl_vs_vq", 4 * 2 + 4 * (1 + 3 + 2)),
     ("latent_scale", 2 * 2 + 3 + 6), ("guidance", 2 + 1 + 6), ("ddim_steps", 2 + 1 + 2 * 7),
     ("transformer_depth", 2 + 3 * (1 + 3 + 1))],
)  # fmt: skip
def test_the_other_studies_share_what_their_trials_have_in_common(name, jobs):
    study = read(STUDIES / f"{name}.yaml")
    assert len(plan(study, resolve(study), PROGRAMS).jobs) == jobs


def test_no_study_is_untested():
    tested = {*SIZES, "toy_f", "toy_f_emoji", "kl_vs_vq", "latent_scale", "guidance", "ddim_steps", "transformer_depth"}
    assert {path.stem for path in STUDIES.glob("*.yaml")} == tested


def toy(*overrides, f=4, **changes):
    """Take one value of f of the toy study."""
    study = read(STUDIES / "toy_f.yaml").changed(overrides)
    return replace(study, axes={"f": {f: study.axes["f"][f]}}, **changes)


def test_flops_are_those_of_one_picture_of_the_latent_size():
    small, large = (resolve(toy(f=f))[0].facts for f in (4, 2))
    ratio = large.network_flops / small.network_flops
    assert 3.9 < ratio < 4.2  # four times the places; attention and time embedding are small


def test_names_follow_what_is_trained():
    names = [resolve(toy(*overrides))[0].name for overrides in ((), (), ("latent.model.params.ema_decay=0.9",))]
    assert names[0] == names[1] != names[2]
    assert resolve(toy(seeds=(24,)))[0].name != names[0]
    assert resolve(toy(seeds=(24,)))[0].first_stage == resolve(toy())[0].first_stage


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["first_stage.data.params.train.params.size=30", "latent.data.params.train.params.size=30"], "multiple of 4"),
        (["latent.model.params.network.params.channel_mult=[1, 2, 3, 4, 5]"], "latents of 8x8 .* multiples of 16"),
        (["first_stage.model.params.autoencoder.params.architecture.params.channel_mult=[1, 1]"], "f=4: .* has f=2"),
        (["latent.model.params.network.params.in_channels=5"], "in_channels is 5.*set in_channels: 3"),
        (["latent.model.params.network.params.model_channel=32"], "did you mean model_channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is(overrides, message):
    with pytest.raises(UserError, match=f"toy_f, f=4: .*{message}"):
        resolve(toy(*overrides))


def test_networks_of_unequal_size_are_refused_where_they_should_be_equal():
    study = read(STUDIES / "toy_f.yaml")
    with pytest.raises(UserError, match="f=4 has 1,856,579.*budget.parameters allows 1%"):
        axes = {"f": {f: study.axes["f"][f] for f in (4, 16)}}
        resolve(replace(study, axes=axes, budget=replace(study.budget, parameters=0.01)))


def test_tasks_of_an_array_share_the_study_out_without_waiting_for_one_another():
    study = read(STUDIES / "kl_vs_vq.yaml")
    whole = plan(study, resolve(study), PROGRAMS)
    parts = [{job.name for job in whole.part(task, 3).jobs} for task in range(3)]
    assert set.union(*parts) == {job.name for job in whole.jobs}
    assert sum(map(len, parts)) == len(whole.jobs)
    for part in parts:
        assert all(set(job.needs) <= part for job in whole.jobs if job.name in part)
    with pytest.raises(UserError, match="tasks count from 0 to 2"):
        whole.part(3, 3)
