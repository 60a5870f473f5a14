"""The use of a codebook in training, and two remedies against its collapse.

Means per batch would call a code dead that comes up in every second batch, and each rank has only its own part; so
codes are counted over an interval and summed over all ranks.

Remedies, both off by default: codes that follow a moving average of the latents that chose them instead of a gradient
(arXiv 1711.00937, App. A.1, without its smoothing), and new places for codes that nothing chooses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.autoencoder.regularizers import count_codes, perplexity_of
from ldm.distributed import rank, world_size
from ldm.errors import UserError
from ldm.networks.synchronized import sum_over_ranks
from ldm.training.randomness import seed_from

_RESTART = 5  # marks the seeds of restarts, so that they never meet those of other draws
_NO_WEIGHT = 1e-20  # what the average of a long unused code weighs at most; it then stays where it is


class CodeCounts:
    """Count on the device how often each of num_codes codes is chosen."""

    def __init__(self, num_codes: int) -> None:
        self._num_codes = num_codes
        self._counts: Tensor | None = None

    def add(self, codes: Tensor) -> None:
        """Count codes (any shape)."""
        counts = count_codes(codes, self._num_codes)
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts

    def total(self, device: torch.device) -> Tensor:
        """Return the counts of all ranks since the last start (num_codes,); every rank must ask, even of nothing."""
        counts = torch.zeros(self._num_codes, dtype=torch.int64) if self._counts is None else self._counts
        return sum_over_ranks(counts.to(device))

    def start(self, counts: Tensor | None = None) -> None:
        """Start anew; of counts that were saved the first rank takes all."""
        self._counts = counts if rank() == 0 else None

    def logs(self, device: torch.device) -> dict[str, Tensor]:
        """Return perplexity and the share of codes in use since the last start, and start anew."""
        perplexity, used = perplexity_of(self.total(device))
        self.start()
        return {"perplexity": perplexity, "codebook_usage": used / self._num_codes}


class CodebookUpkeep:
    """Move the codes once per optimiser step, equally on all ranks.

    decay: codes are the moving average, with this decay per step, of the latents that chose them; no gradient moves
    them then, and their term in the loss is a constant. This wakes no code that is never chosen. restart_every: at
    every so many steps, codes that were not chosen since the last time take the place of latents drawn at random from
    the batch. At least one of both is given.
    Every rank has equally many samples. The state is saved with that of the optimiser, not among the weights.
    """

    def __init__(self, decay: float | None = None, restart_every: int | None = None) -> None:
        if decay is None and restart_every is None:
            raise UserError("CodebookUpkeep: give decay (e.g. 0.99), restart_every (e.g. 1000) or both")
        if decay is not None and not 0.0 <= decay < 1.0:
            raise UserError(f"CodebookUpkeep.decay: {decay}; give a number from 0 to below 1, e.g. 0.99")
        if restart_every is not None and restart_every < 1:
            raise UserError(f"CodebookUpkeep.restart_every: {restart_every}; give a number of steps, 1 or more")
        self.decay, self.restart_every = decay, restart_every
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._average: Tensor | None = None  # sums of latents and, last, how many: (n, d + 1)
        self._window: CodeCounts | None = None

    @property
    def replaces_gradient(self) -> bool:
        """Return whether codes move by the average alone."""
        return self.decay is not None

    def observe(self, z: Tensor, codes: Tensor) -> None:
        """Keep the latents (B, d, H, W) of a batch and the codes (B*H*W,) that they chose until the step is made."""
        latents = z.detach().flatten(2).transpose(1, 2)  # (B, H*W, d)
        self._batches.append((latents, codes.view(latents.shape[:2])))

    @torch.no_grad()
    def update(self, codebook: Tensor, seed: int, step: int) -> None:
        """Move the codebook (n, d) by what was observed for optimiser step number `step`, counted from 1."""
        latents, codes = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches.clear()
        if self.decay is not None:
            self._follow(codebook, latents, codes)
        if self.restart_every is not None:
            self._counts(codebook).add(codes)
            if step % self.restart_every == 0:
                self._restart(codebook, latents, seed_from(seed, step, _RESTART))

    def _counts(self, codebook: Tensor) -> CodeCounts:
        if self._window is None:
            self._window = CodeCounts(len(codebook))
        return self._window

    def _follow(self, codebook: Tensor, latents: Tensor, codes: Tensor) -> None:
        weighted = _weighted(latents.flatten(0, 1))  # (B*H*W, d + 1)
        sums = weighted.new_zeros(len(codebook), weighted.shape[1]).index_add_(0, codes.flatten(), weighted)
        sums = sum_over_ranks(sums)
        average = _weighted(codebook) if self._average is None else self._average.to(sums)
        moved = torch.lerp(average, sums, 1 - self.decay)
        self._average = torch.where(sums.isfinite().all(), moved, average)  # a broken batch leaves no trace
        total, weight = self._average[:, :-1], self._average[:, -1:]
        codebook.copy_(torch.where(weight > _NO_WEIGHT, total / weight, codebook))

    def _restart(self, codebook: Tensor, latents: Tensor, seed: int) -> None:
        unused = self._counts(codebook).total(codebook.device) == 0  # (n,)
        self._counts(codebook).start()
        places = _draw(latents, len(codebook), seed).to(codebook)
        unused = (unused & places.isfinite().all(dim=1))[:, None]
        # Adam's moments of a row need no reset: without gradients they have faded.
        codebook.copy_(torch.where(unused, places, codebook))
        if self._average is not None:
            self._average = torch.where(unused, _weighted(places), self._average)

    def state_dict(self, device: torch.device) -> dict[str, Tensor]:
        """Return the average and the counts of all ranks; every rank must ask."""
        average = {} if self._average is None else {"average": self._average}
        return average if self._window is None else average | {"window": self._window.total(device)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a run was saved; what it did not keep begins anew."""
        self._average = state.get("average")
        if "window" in state:
            self._window = CodeCounts(len(state["window"]))
            self._window.start(state["window"])


def _weighted(latents: Tensor) -> Tensor:
    """Return latents (N, d), each with its weight 1 behind it: (N, d + 1)."""
    return torch.cat([latents, latents.new_ones(len(latents), 1)], dim=1)


def _draw(latents: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` latents (count, d) of all ranks' (B, N, d), the same on all ranks and for any number of them.

    Sample i of rank r counts as number i * ranks + r of the batch; none comes twice while there are enough.
    """
    samples, positions, ranks = latents.shape[0], latents.shape[1], world_size()
    total = samples * ranks * positions
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    picks = order[torch.arange(count) % total].to(latents.device)
    sample, position = picks // positions, picks % positions
    mine = (sample % ranks == rank())[:, None]
    return sum_over_ranks(torch.where(mine, latents[sample // ranks, position], 0.0))
