"""Averages of weights with the power function as their profile, and others of any length made from snapshots of them.

At step t such an average weighs the weights of step s by (gamma + 1) s^gamma / t^(gamma + 1); its relative length
sigma_rel is the standard deviation of that profile divided by t (Karras et al., "Analyzing and improving the training
dynamics of diffusion models", arXiv 2312.02696, section 3). A profile that nobody kept is approximated, in least
squares, by a combination of the profiles of snapshots (appendix C).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, shown
from ldm.weights import files as storage
from ldm.writing import replacing

_FARTHEST = 0.2  # that a combination may be from what was asked for; its weights would be too small
LONGEST = 0.28  # above it gamma would be negative: sigma_rel of a plain mean over all steps is 1 / sqrt(12)
_PATTERN = "step=*.safetensors"


@dataclass(frozen=True)
class Profile:
    """A power-function average of this relative length after `steps` updates."""

    steps: int
    sigma_rel: float


@dataclass(frozen=True)
class Snapshot:
    """One average in a file: its name there, and its profile."""

    file: Path
    name: str
    profile: Profile


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a relative length (equation 126). UserError unless 0 < sigma_rel < 0.28."""
    if not 0 < sigma_rel < LONGEST:
        raise UserError(f"average: sigma_rel is {sigma_rel:g}; choose between 0 and {LONGEST}, such as 0.05 or 0.1")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def coefficients(snapshots: Sequence[Profile], target: Profile) -> np.ndarray:
    """Return by how much each of N profiles counts in their nearest combination to `target`: (N,) float64."""
    steps, gammas = _columns([*snapshots, target])
    products = _products(steps[:, None], gammas[:, None], steps[None], gammas[None])  # (N + 1, N + 1)
    return np.linalg.solve(products[:-1, :-1], products[:-1, -1])


def error(snapshots: Sequence[Profile], target: Profile) -> float:
    """Return the distance of the nearest combination from `target`, relative to it; 0 is exact."""
    weights = np.append(coefficients(snapshots, target), -1.0)
    steps, gammas = _columns([*snapshots, target])
    products = _products(steps[:, None], gammas[:, None], steps[None], gammas[None])
    return float(np.sqrt(max(weights @ products @ weights, 0.0) / products[-1, -1]))


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([profile.steps for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma_of(profile.sigma_rel) for profile in profiles])


def _products(a: np.ndarray, gamma_a: np.ndarray, b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integrate the product of two profiles, which end at steps a and b (equation 131)."""
    exponent = np.where(a < b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (a / b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(a, b))


def write_snapshot(
    folder: Path, step: int, averages: dict[str, dict[str, Tensor]], profiles: dict[str, Profile], run: str
) -> Path:
    """Write averages, by their names, in half precision to `folder`/step=STEP.safetensors, whole or not at all."""
    tensors = {f"{name}.{key}": value.half() for name, average in averages.items() for key, value in average.items()}
    described = {name: [profile.steps, profile.sigma_rel] for name, profile in profiles.items()}
    path = folder / f"step={step:09}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        storage.write_safetensors(beside, tensors, {"averages": json.dumps(described), "run": run})
    return path


def run_of(folder: Path) -> str:
    """Return of which run the first snapshot in a folder says that it is, nothing without one."""
    for file in sorted(folder.glob(_PATTERN)):
        with suppress(UserError):
            return storage.safetensors_metadata(file).get("run", "")
    return ""


def find_snapshots(folder: Path, run: str = "") -> list[Snapshot]:
    """List the averages in a folder of snapshots by their steps.

    UserError if there are fewer than two, or if they are of several runs or of another than `run`, where that is known.
    """
    found, runs = [], {}
    for file in sorted(folder.glob(_PATTERN)):
        texts = storage.safetensors_metadata(file)
        try:
            described = json.loads(texts["averages"])
            runs.setdefault(texts["run"], file.name)
            found += [Snapshot(file, name, Profile(int(n), float(sigma))) for name, (n, sigma) in described.items()]
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
            raise UserError(f"{file}: is no snapshot of averages") from problem
    if len(runs) > 1:
        raise UserError(f"{folder}: has snapshots of several runs ({', '.join(runs.values())}); keep those of one")
    if run and found and run not in runs:
        other = f"has snapshots of another run ({shown(next(iter(runs)))}; this one is {shown(run)})"
        raise UserError(f"{folder}: {other}; keep those of this run there")
    if len(found) < 2:
        raise UserError(
            f"{folder}: {len(found)} snapshots of averages, two are needed; train with training.params.averages and "
            "lightning.callbacks.snapshots.target=ldm.training.snapshots.Snapshots"
        )
    return found


def reconstruct(snapshots: Sequence[Snapshot], target: Profile) -> dict[str, Tensor]:
    """Return the weights of an average of another length or earlier step: float32, by the names of the parameters.

    Files are read one after the other. UserError for a damaged file, for a step that the snapshots do not reach, and
    for an average that no combination of them comes near.
    """
    steps = sorted({snapshot.profile.steps for snapshot in snapshots})
    last = max(snapshot.profile.steps for snapshot in snapshots)
    if not 1 <= target.steps <= last:
        raise UserError(f"average: step {target.steps} is not between 1 and {last}, the last snapshot")
    usable = [snapshot for snapshot in snapshots if snapshot.profile.steps <= target.steps]
    if len(usable) < 2:
        raise UserError(f"average: fewer than two snapshots until step {target.steps}; choose a later step")
    profiles = [snapshot.profile for snapshot in usable]
    if (distance := error(profiles, target)) > _FARTHEST:
        nearest = min(steps, key=lambda step: abs(step - target.steps))
        hint = (
            "choose a length nearer to those that were kept" if nearest == target.steps else f"step {nearest} has one"
        )
        raise UserError(
            f"average: the snapshots until step {target.steps} come no nearer than {distance:.0%} to sigma_rel "
            f"{target.sigma_rel:g}; {hint}, or keep more snapshots"
        )
    shares = coefficients(profiles, target)
    total: dict[str, Tensor] = {}
    for file in dict.fromkeys(snapshot.file for snapshot in usable):
        tensors = storage.read_safetensors(file)
        for snapshot, share in zip(usable, shares, strict=True):
            if snapshot.file != file:
                continue
            start = f"{snapshot.name}."
            own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            if total and own.keys() != total.keys():
                raise UserError(f"{file}: has other weights than the snapshots before it")
            for name, value in own.items():
                total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * value.double()
    return {name: value.float() for name, value in total.items()}
