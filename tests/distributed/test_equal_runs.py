"""Several processes train as one does: same samples, same draws, same steps, up to the order of sums.

Tolerances are those of float32 sums in another order (float64 for the autoencoder, see equal_runs.py).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
FOUR = pytest.param(4, marks=pytest.mark.slow)
MANY = [(1, 2), (2, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
TOLERANCE = {"diffusion": 1e-7, "autoencoder": 1e-9}  # measured: 1.5e-8 (float32, one unit) and 2.4e-10 (float64)


class Reports:
    """Reports of all ranks by (case, processes, accumulation); four processes train only when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        self._train(1, 2)

    def __getitem__(self, key: tuple[str, int, int]) -> list[dict[str, Any]]:
        if key not in self._found:
            self._train(key[1])
        return self._found[key]

    def _train(self, *worlds: int) -> None:
        paths = [str(HERE.parents[1]), str(HERE.parent)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "equal_runs.py"), str(self._folder), *map(str, worlds)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        self._found.clear()
        for path in sorted(self._folder.glob("*.pt")):  # by rank
            case, world, accumulate, _ = path.stem.split("-")
            self._found.setdefault((case, int(world), int(accumulate)), []).append(torch.load(path, weights_only=True))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return Reports(tmp_path_factory.mktemp("ranks"))


def learned(report: dict[str, Any]) -> dict[str, Tensor]:
    """Give weights, averages and Adam's state; running statistics of the discriminator stay per rank."""
    return {k: v for k, v in (report["weights"] | report["adam"]).items() if "running_" not in k and "tracked" not in k}


@pytest.mark.parametrize("case", ["diffusion", "autoencoder"])
@pytest.mark.parametrize(("world", "accumulate"), MANY)
def test_ranks_and_accumulation_equal_one_large_batch(case: str, world: int, accumulate: int, reports: Reports) -> None:
    assert_equal(case, reports[case, 1, 1][0], reports[case, world, accumulate], world)


@pytest.mark.parametrize("case", ["diffusion", "autoencoder"])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), *MANY])
def test_another_number_of_ranks_goes_on_in_mid_epoch(case: str, world: int, accumulate: int, reports: Reports) -> None:
    alone, resumed = reports[case, 1, 1][0], reports[f"{case}resumed", world, accumulate]
    assert_equal(case, alone, resumed, world)
    if (world, accumulate) == (1, 1):
        assert all(torch.equal(value, learned(alone)[name]) for name, value in learned(resumed[0]).items())


def assert_equal(case: str, alone: dict[str, Any], together: list[dict[str, Any]], world: int) -> None:
    """Compare what was learned by one process and by several."""
    assert len(together) == world
    expected, moved = learned(alone), 0.0
    for name, value in learned(together[0]).items():
        # Adam's momenta of the autoencoder, whose loss sums over pixels, are not near 1 as weights are.
        tolerance = TOLERANCE[case] * max(1.0, float(expected[name].abs().max()) if value.numel() else 0.0)
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)
        if name.endswith("exp_avg"):
            moved = max(moved, float(value.abs().max()))
    assert moved > 1e-4
    assert {report["lr"] for report in together} == {alone["lr"]}
    assert {report["counts"] for report in together} == {(4, 16, 0)} == {alone["counts"]}


@pytest.mark.parametrize("case", ["diffusion", "autoencoder", "marked"])
@pytest.mark.parametrize("world", [2, FOUR])
def test_ranks_end_bit_equal(case: str, world: int, reports: Reports) -> None:
    first, *others = (learned(report) for report in reports[case, world, 1])
    for other in others:
        assert all(torch.equal(value, first[name]) for name, value in other.items())


@pytest.mark.parametrize(("world", "accumulate"), MANY)
def test_ranks_share_the_samples_of_one(world: int, accumulate: int, reports: Reports) -> None:
    (alone,), together = reports["diffusion", 1, 1], reports["diffusion", world, accumulate]
    batches = zip(*(report["samples"] for report in together), strict=True)
    seen = [sum(parts, []) for parts in batches]
    steps = [sum(seen[i : i + accumulate], []) for i in range(0, len(seen), accumulate)]
    assert [sorted(step) for step in steps] == [sorted(step) for step in alone["samples"]]
    assert all(len(set(step)) == 4 for step in steps)


@pytest.mark.parametrize(("world", "accumulate"), MANY)
def test_latent_scale_is_measured_alike(world: int, accumulate: int, reports: Reports) -> None:
    scales = [float(report["weights"]["scale_factor"]) for report in reports["diffusion", world, accumulate]]
    assert len(set(scales)) == 1 and scales[0] != 1
    assert scales[0] == pytest.approx(float(reports["diffusion", 1, 1][0]["weights"]["scale_factor"]), rel=1e-6)


@pytest.mark.parametrize("case", ["diffusion", "autoencoder"])
@pytest.mark.parametrize("world", [2, FOUR])
def test_validation_sees_each_sample_once(case: str, world: int, reports: Reports) -> None:
    (alone,), together = reports[case, 1, 1], reports[case, world, 1]
    # Running statistics of batch norm, per rank, reach what the discriminator says.
    names = [n for n in alone["validation"] if not any(word in n for word in ("disc_", "logits", "g_loss"))]
    assert len(names) >= 6
    for report in together:
        for name in names:
            assert report["validation"][name] == pytest.approx(alone["validation"][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("world", [1, 2, FOUR])
def test_a_bad_sample_of_one_rank_is_skipped_by_all(world: int, reports: Reports) -> None:
    met = sum(any(0 in batch for batch in batches) for batches in _steps(reports["marked", world, 1]))
    assert met > 0
    for report in reports["marked", world, 1]:
        assert report["counts"] == (4, 16, met)
        assert all(value.isfinite().all() for value in learned(report).values())


def _steps(ranks: list[dict[str, Any]]) -> list[tuple[list[int], ...]]:
    return list(zip(*(report["samples"] for report in ranks), strict=True))


def test_averages_of_sharded_parameters_equal_those_of_whole_ones(reports: Reports) -> None:
    for plain, sharded in reports["average", 2, 1]:
        assert plain["state"].keys() == sharded["state"].keys()
        for name, value in plain["state"].items():
            torch.testing.assert_close(sharded["state"][name], value, rtol=0, atol=1e-6)
        for key in ("applied", "raw"):
            torch.testing.assert_close(sharded[key], plain[key], rtol=0, atol=1e-6)
        assert not torch.equal(plain["applied"][0], plain["raw"][0])
