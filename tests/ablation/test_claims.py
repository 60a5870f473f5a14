"""What papers say is compared by seed; what the seeds differ by is no effect."""

import pytest

from ldm.ablation.claims import verdicts
from ldm.ablation.study import Claim
from ldm.ablation.tables import STEPS, half_width

CLAIM = Claim("a helps", "frechet", better={"a": "on"}, worse={"a": "off"})


def rows(on, off, metric="frechet[scenenet]", steps=20, **more):
    """Return a row of each seed for each of the two groups."""
    groups = {"on": on, "off": off}
    return [
        {"a": a, **more, "seed": seed, STEPS: steps, metric: value}
        for a, values in groups.items()
        for seed, value in enumerate(values)
    ]


def seen(found, claim=CLAIM):
    (row,) = verdicts([claim], found, curve_steps=20)
    return row["here"]


@pytest.mark.parametrize(
    ("on", "off", "here"),
    [
        ((5.0, 6.0, 7.0), (8.0, 9.1, 9.9), "shown"),  # by seed, though the groups nearly overlap
        ((8.0, 9.1, 9.9), (5.0, 6.0, 7.0), "the opposite is seen"),
        ((5.0, 6.0, 7.0), (6.0, 5.0, 7.5), "not shown at this size"),
        ((5.0,), (9.0,), "not decided: it takes two seeds or more"),
        ((), (), "not decided: it takes two seeds or more"),
    ],
)
def test_a_difference_counts_where_it_is_more_than_that_of_seeds(on, off, here):
    assert seen(rows(on, off)) == here


def test_more_is_better_for_what_is_no_distance():
    claim = Claim("a helps", "recall", {"a": "on"}, {"a": "off"})
    assert seen(rows((0.8, 0.81, 0.82), (0.5, 0.52, 0.51), "recall[scenenet]"), claim) == "shown"


def test_a_group_is_the_mean_over_the_axes_that_it_does_not_name():
    pairs = [rows((1.0, 2.0), (11.0, 12.0), b=1), rows((3.0, 4.0), (15.0, 14.0), b=2)]
    (row,) = verdicts([CLAIM], [*pairs[0], *pairs[1]], curve_steps=20)
    assert (row["better group"], row["worse group"]) == (2.5, 13.0)
    assert row["gain, 95% interval"] == f"{10.5:.4g} ± {half_width([11.0, 10.0]):.2g}"


def test_other_numbers_of_steps_are_left_out():
    found = rows((5.0, 6.0), (8.0, 9.0)) + rows((9.0, 9.5), (1.0, 1.2), steps=4)
    assert seen(found) == "shown"
    assert seen(found, Claim("a helps", "frechet", {"a": "on"}, {"a": "off"}, steps=4)) == "the opposite is seen"


@pytest.mark.parametrize(("values", "half"), [([1.0, 2.0, 3.0], 2.484), ([0.0, 1.0], 6.353), ([0.0, 1.0] * 10, 0.240)])
def test_intervals_are_those_of_students_t(values, half):
    assert half_width(values) == pytest.approx(half, rel=5e-3)
