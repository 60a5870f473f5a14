"""Skip steps whose gradients are not finite, so that one bad batch does not end a run of weeks.

Works around Lightning 2.6: outside of 16-bit precision it has no such check, and `detect_anomaly` stops the run. The
decision is made from the gradients after their exchange, so all ranks make the same one, and on the device, so no step
waits for it: torch's fused optimisers take the flag as a tensor. The counts are read only when they are logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ldm.errors import UserError


def skipping(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimiser that leaves out a step if its `found_inf` says so, None if there is none.

    Those of torch do so where they are fused. What shares its state over ranks steps by another one of its own.
    """
    steps = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return steps if all(group.get("fused") for group in steps.param_groups) else None


class StepGuard:
    """Skip steps with an inf or nan gradient (weights, optimiser and protected buffers stay), and count them.

    More than `limit` such steps in a row are an error (0: the first one is), found when `check_limit` is called.
    """

    def __init__(self, limit: int = 10) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise UserError(f"lightning.max_skipped_steps: {limit!r} is no number of steps; give 0 or more")
        self.limit = limit
        self._skips = torch.zeros((), dtype=torch.bool)
        self._counts = torch.zeros(3, dtype=torch.int64)  # skipped steps: in all, in a row, most in a row
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def num_skipped(self) -> Tensor:
        """Return the number of skipped steps, on the device."""
        return self._counts[0]

    def protect(self, buffers: Sequence[Tensor]) -> None:
        """Back up buffers that a forward pass changes, such as running statistics, for skipped steps."""
        self._kept = [(buffer, buffer.clone()) for buffer in buffers]

    def check_gradients(self, optimizer: Optimizer) -> None:
        """Decide from the unscaled gradients whether the coming step is skipped."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # The largest entry would say the same, ten times slower on a CPU. Squares overflow from entries of 1e19 on.
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self._skips = ~norm.isfinite()
        fused = skipping(optimizer)
        if fused is not None and self._skips.device.type != "cpu":
            fused.found_inf = self._skips.float()
        elif self._skips:  # waits for the device, where there is one
            for parameter in parameters:
                parameter.grad = None

    def after_step(self) -> Tensor:
        """Count the step and restore the buffers; return whether it was skipped: bool (), on the device."""
        total, row, most = self._counts.to(self._skips.device).unbind()
        row = (row + 1) * self._skips
        self._counts = torch.stack([total + self._skips, row, torch.maximum(most, row)])
        for buffer, kept in self._kept:
            kept.copy_(torch.where(self._skips, kept, buffer))
            buffer.copy_(kept)
        return self._skips

    def check_limit(self, tolerated: int = 0) -> None:
        """Raise UserError if more than `limit` + `tolerated` steps in a row were skipped."""
        most = int(self._counts[2])
        if most > self.limit + tolerated:
            raise UserError(
                f"training: the gradients of {most} steps in a row were not finite, so nothing was learned from them; "
                "lower the learning rate, clip the gradients (lightning.trainer.gradient_clip_val), use "
                "--precision bf16-mixed or 32, or look for bad data"
            )

    def state_dict(self) -> dict[str, int]:
        """Return the counts as numbers."""
        total, row, _ = self._counts.tolist()
        return {"skipped": total, "in_a_row": row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from counts."""
        self._counts = torch.tensor([state["skipped"], state["in_a_row"], state["in_a_row"]])
