"""Which devices train: from --gpus, --devices and the trainer section of the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import ConfigError, UserError
from ldm.training.launch import Launch

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")


@dataclass(frozen=True)
class Devices:
    """The accelerator and its devices, as arguments of Lightning's Trainer: how many, or which."""

    accelerator: str
    devices: int | list[int]

    @property
    def count(self) -> int:
        """Return the number of devices of one node."""
        return len(self.devices) if isinstance(self.devices, list) else self.devices

    def check(self) -> None:
        """Raise UserError for devices that this machine does not have."""
        if self.accelerator in ("cpu", "tpu"):
            return
        present = _count_accelerators()
        needed = max(self.devices) + 1 if isinstance(self.devices, list) else self.devices
        if needed > present:
            asked = ",".join(map(str, self.devices)) if isinstance(self.devices, list) else f"{self.devices} of them"
            raise UserError(
                f"devices: GPU {asked} asked for, but this machine has {present or 'none'}; "
                "choose other devices, or --accelerator cpu"
            )


def choose(
    gpus: str | None,
    devices: str | None,
    accelerator: str | None,
    trainer: dict[str, Any],
    launch: Launch | None = None,
) -> Devices:
    """Choose devices; the command line wins over the trainer section, whose device keys are removed from it.

    A launcher has started one process a device: the command line must agree with it, the section is replaced by it.
    By default one device: an accelerator if there is one, else the CPU. Raises UserError for unknown forms.
    """
    chosen = _choose(gpus, devices, accelerator, trainer)
    if launch is None or chosen.count == launch.per_node:
        return chosen
    launch.check(None if gpus is None and devices is None else chosen.count, None)
    return Devices(chosen.accelerator, launch.per_node)


def _choose(gpus: str | None, devices: str | None, accelerator: str | None, trainer: dict[str, Any]) -> Devices:
    configured = {key: trainer.pop(key, None) for key in ("gpus", "devices", "accelerator")}
    if gpus is not None and devices is not None:
        raise UserError("--gpus and --devices: give one of them")
    gpu_flag = "--gpus"
    if gpus is None and devices is None and configured["gpus"] is not None:
        gpus, gpu_flag = configured["gpus"], "lightning.trainer.gpus"
    if gpus is not None:
        chosen = _parse(gpus, gpu_flag, "gpu")
        return Devices("cpu", 1) if chosen == 0 else Devices("gpu", chosen)
    kind = accelerator or configured["accelerator"] or "auto"
    if kind not in _ACCELERATORS:
        problem = f"{kind!r} is unknown; use one of {', '.join(_ACCELERATORS)}"
        raise ConfigError(problem, "--accelerator" if accelerator else "lightning.trainer.accelerator")
    if kind == "auto":
        kind = "gpu" if _count_accelerators() else "cpu"
    wanted = devices if devices is not None else configured["devices"]
    flag = "--devices" if devices is not None else "lightning.trainer.devices"
    parsed = 1 if wanted is None else _parse(wanted, flag, kind)
    if parsed == 0:
        raise UserError(f"{flag}: at least one device is needed; `--gpus 0` means the CPU")
    return Devices(kind, parsed)


def _parse(value: Any, flag: str, kind: str) -> int | list[int]:
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value)) + ","
    text = str(value).strip()
    if text in ("auto", "-1"):
        return 1 if kind == "cpu" else _count_accelerators()
    try:
        numbers = [] if isinstance(value, bool) else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"{flag}: '{value}' is not understood; write 1 (how many), `0,` or 0,1 (which), or auto")
    if "," not in text:
        return numbers[0]
    return numbers if kind != "cpu" else len(numbers)


def _count_accelerators() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
