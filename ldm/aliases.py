"""Names of types that several rooms share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]  # what a loader yields: one entry a key, each with B samples
Noise: TypeAlias = Callable[[tuple[int, ...]], Tensor]  # shape -> standard normal numbers
Uniform: TypeAlias = Callable[[tuple[int, ...]], Tensor]  # shape -> numbers from [0, 1), on the CPU
