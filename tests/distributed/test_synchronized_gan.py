"""Two ranks of half a batch each equal one rank with all of it, also behind disc_start, if norm and weight allow it.

In float64: what is left is the order of sums. Adam divides by a gradient's own size and would turn the rounding of
float32, where a gradient is mathematically zero, into whole steps.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gan_runs
import pytest
import torch
from gan_runs import RANKS, TOLERANCE, VARIANTS


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Train on one rank and on two; give by variant where the one rank, the first and the second of two ended."""
    folder, program = tmp_path_factory.mktemp("ranks"), Path(gan_runs.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(program.parents[1]), str(program.parent)])}
    subprocess.run([sys.executable, str(program), str(folder)], env=environment, check=True, timeout=600)
    numbers = [(0, 1), (0, RANKS), (1, RANKS)]
    return {
        variant: [torch.load(folder / f"{variant}-{rank}-of-{of}.pt") for rank, of in numbers] for variant in VARIANTS
    }


def difference(first: dict[Any, torch.Tensor], second: dict[Any, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.parametrize("variant", ["synchronized", "actnorm"])
@pytest.mark.parametrize("part", ["weights", "momenta", "upkeep", "codes"])
def test_two_ranks_equal_one(ends: dict[str, list[dict[str, Any]]], variant: str, part: str) -> None:
    one, first, _ = ends[variant]
    assert difference(one[part], first[part]) < TOLERANCE


def test_what_synchronisation_is_for(ends: dict[str, list[dict[str, Any]]]) -> None:
    one, first, _ = ends["per_rank"]
    assert difference(one["weights"], first["weights"]) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_end_with_the_same_weights(ends: dict[str, list[dict[str, Any]]], variant: str) -> None:
    _, first, second = ends[variant]
    own = ("running_mean", "running_var") if variant == "per_rank" else ()  # each rank's own batches
    weights = [{name: v for name, v in end["weights"].items() if not name.endswith(own)} for end in (first, second)]
    assert difference(*weights) == 0
    assert difference(first["upkeep"], second["upkeep"]) == 0
