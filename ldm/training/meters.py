"""Means that stay on the device until they are logged, so that no step waits for it."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMean:
    """Average scalar tensors by name; values that are not finite are left out, as their steps are."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        """Add one value per name."""
        for name, value in logs.items():
            value = value.detach().float()
            counts = value.isfinite()
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(counts, value, 0.0)
            self._counts[name] = self._counts.get(name, 0.0) + counts.float()

    def take(self) -> dict[str, Tensor]:
        """Return the means since the last call, nan of what was never finite, and reset."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what was added since the last call of `take`."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        """Go on from a saved state."""
        self._sums, self._counts = (
            {name: value.to(device).reshape(()) for name, value in state[part].items()} for part in ("sums", "counts")
        )


class DatasetMean:
    """Average means over batches of different sizes by name, as if all samples were one batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, logs: dict[str, Tensor], count: int) -> None:
        """Add the means over a batch of `count` samples."""
        for name, value in logs.items():
            value = value.detach().float()
            table = torch.stack([value * count, torch.full_like(value, count)])
            self._sums[name] = self._sums[name] + table if name in self._sums else table

    def take(self) -> tuple[list[str], Tensor]:
        """Return names and (sum, count) for each, (N, 2), and reset."""
        names, tables = list(self._sums), list(self._sums.values())
        self._sums = {}
        return names, torch.stack(tables) if tables else torch.zeros(0, 2)


class LossByTimestep:
    """Average per-sample losses (B,) in each quarter of the training times, separately per name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, losses: Tensor, u: Tensor) -> None:
        """Add losses (B,) at the quantiles u (B,) in [0, 1) of the density of training times."""
        quarter = (u.to(losses.device) * 4).long()
        table = torch.zeros(4, 2, device=losses.device).index_add_(
            0, quarter, torch.stack([losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)], dim=1)
        )
        self._sums[name] = self._sums[name] + table if name in self._sums else table

    def take(self) -> dict[str, Tensor]:
        """Return (sum, count) per quarter, (4, 2), by name, and reset."""
        tables, self._sums = self._sums, {}
        return tables

    @staticmethod
    def means(name: str, table: Tensor) -> dict[str, Tensor]:
        """Turn a table, perhaps summed over ranks, into means of the quarters that have a sample."""
        return {f"{name}_q{index + 1}": total / count for index, (total, count) in enumerate(table) if count > 0}
