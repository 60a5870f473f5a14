"""Which devices train: from --gpus, --devices and the trainer section of the config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import ConfigError, UserError
from ldm.networks import fused_norm
from ldm.training.launch import Launch

_FEW = 64  # processes are let start on any CPU
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

    def of_process(self) -> torch.device:
        """Return the device of this process."""
        if self.accelerator == "cpu":
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", 0))
        index = self.devices[rank] if isinstance(self.devices, list) else rank
        return torch.device(torch.accelerator.current_accelerator().type, index)

    @property
    def is_cuda(self) -> bool:
        """Return whether these are devices of CUDA, and this machine has some."""
        return self.accelerator in ("gpu", "cuda") and torch.cuda.is_available()

    @property
    def normalises_channels_last(self) -> bool:
        """Return whether our kernels of group norm run on them; torch's would copy images that lie channels last."""
        return self.is_cuda and fused_norm.is_available(self.of_process())

    def check_precision(self, precision: str) -> None:
        """Raise UserError for a precision (of Lightning's) in which they cannot compute."""
        if precision.startswith("16") and self.accelerator == "cpu":
            raise UserError(f"--precision {precision}: a CPU has no training in float16; use bf16-mixed or 32")
        if precision.startswith("bf16") and self.is_cuda and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name(self.of_process())
            raise UserError(f"--precision {precision}: {name} has no bfloat16; use 16-mixed or 32")

    def check(self) -> None:
        """Raise UserError for devices that this machine does not have."""
        most = max(_FEW, 4 * (os.cpu_count() or 1))
        if self.accelerator == "cpu" and self.count > most:
            raise UserError(f"devices: {self.count} processes on {os.cpu_count()} cores; use at most {most}")
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


def autocast(precision: str, device_type: str) -> torch.autocast:
    """Return the context in which steps of a precision (of Lightning's) compute on a kind of device."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.removesuffix("-mixed"))
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Multiply float32 matrices inside a block in torch's precision highest, high (TF32) or medium; None leaves it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
