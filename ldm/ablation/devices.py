"""Where the jobs of a study run: one at a time on each slot."""

from __future__ import annotations

import os

import torch

from ldm.ablation.workspace import DeviceSlot
from ldm.errors import UserError


def device_slots(devices: str, workers: int | None, cpu_workers: int) -> list[DeviceSlot]:
    """Return a slot for each job that may run at a time.

    Args:
        devices: auto, cpu, or GPUs by number as 0,1.
        workers: slots on each device; None means `cpu_workers` on the CPU, else one.

    Raises UserError for GPUs that this machine does not have.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if devices == "cpu" or (devices == "auto" and kind is None):
        return [DeviceSlot("cpu", (("accelerator", "cpu"),))] * (workers or cpu_workers)
    numbers = ["0"] if devices == "auto" else devices.split(",")
    present = [] if kind is None else list(map(str, range(torch.accelerator.device_count())))
    if not set(numbers) <= set(present):
        hint = "write auto, cpu, or numbers of them as 0,1"
        raise UserError(f"--devices {devices}: this machine has {len(present)} GPUs; {hint}")
    return [DeviceSlot(f"{kind.type}:{number}", (("gpus", f"{number},"),)) for number in numbers] * (workers or 1)


def share_cores(num_jobs: int) -> dict[str, str]:
    """Return the environment of a job, with an equal share of the cores of this machine."""
    return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_jobs, 1))}
