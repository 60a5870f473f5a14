"""Alignment of hidden states with a frozen network's features of patches (REPA: Yu et al., arXiv 2410.06940).

To the loss is added weight * -mean_n cos(y_n, h(s_n)), equation 8: s is the state behind one block of the network that
sees the noisy latent, h a perceptron that belongs to the training, y the teacher's features of the image itself, n the
patches. Teachers: `ldm.evaluation.extractors.Dino`, `Clip`, and `ldm.toy.scene_extractor.SceneNet`, which ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.bounds import Count, NonNegative, Size
from ldm.errors import UserError
from ldm.networks.backbone import ShowsHidden


class Teacher(Protocol):
    """A frozen network, read at its first use, with features of patches.

    width: their channels; grid: (height, width) of the patches, None if they are as many as are asked for.
    """

    name: str
    width: int
    grid: tuple[int, int] | None

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the weights."""

    def to(self, device: torch.device) -> Teacher:
        """Move to a device and return itself."""

    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return float32 features (B, width, h, w) of images (B, C, H, W) in [-1, 1], h, w as in `grid` if they can."""


class Alignment(nn.Module):
    """A term of the loss that pulls hidden states to a teacher's features.

    Before its first use it is bound to a network. The teacher is no part of its state, the perceptron is; models are
    exported without it.
    """

    def __init__(
        self,
        teacher: Teacher,
        depth: Count = 8,
        weight: NonNegative = 0.5,
        until: Count | None = None,
        hidden_size: Size = 2048,
        resample: bool = False,
    ) -> None:
        """Describe the term; defaults are those of the paper.

        Args:
            teacher: Network whose features are aligned to.
            depth: Number of blocks before the state, in their order of use (of a U-Net, encoder, middle, decoder).
            weight: Of the term in the loss.
            until: Optimiser step from which on the term is left out; None keeps it.
            hidden_size: Width of the perceptron.
            resample: Whether features on another grid than that of the state are interpolated, bilinearly.
        """
        super().__init__()
        self.teacher, self.depth, self.weight, self.until = teacher, depth, weight, until
        self.hidden_size, self.resample = hidden_size, resample

    def bind(self, network: nn.Module) -> Alignment:
        """Make the perceptron. UserError for a network that shows no states, or has fewer blocks."""
        name = type(network).__name__
        if not isinstance(network, ShowsHidden):
            raise UserError(f"alignment: {name} shows no hidden states; it needs ldm.networks.backbone.ShowsHidden")
        if self.depth > (count := len(network.hidden_shapes)):
            raise UserError(f"alignment: depth is {self.depth}, but {name} has {count} blocks; use 1 to {count}")
        self.shape = network.hidden_shapes[self.depth - 1]
        widths = (self.shape.channels, self.hidden_size, self.hidden_size, self.teacher.width)
        layers = [nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
        self.projector = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        return self

    def grid_problem(self, height: int, width: int) -> str:
        """Return why states of latents (..., height, width) cannot be aligned; empty if they can."""
        grid, theirs = (height // self.shape.factor, width // self.shape.factor), self.teacher.grid
        if theirs in (None, grid) or self.resample:
            return ""
        sides = "the state behind block {} has {}x{} patches, the teacher {} {}x{}"
        found = sides.format(self.depth, *grid, self.teacher.name, *theirs)
        return f"alignment: {found}; choose another depth or size, or set resample: true"

    def is_on(self, step: int) -> bool:
        """Return whether the term is part of the loss of this optimiser step."""
        return self.until is None or step < self.until

    def forward(self, hidden: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return the term without its weight, in [-1, 1], for the states behind all blocks and images (B, C, H, W)."""
        state = hidden[self.depth - 1]  # (B, D, h, w)
        grid = tuple(state.shape[2:])
        features = self.teacher.patches(images, grid)
        if tuple(features.shape[2:]) != grid:
            if problem := self.grid_problem(*(side * self.shape.factor for side in grid)):
                raise UserError(problem)
            features = F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)
        projected = self.projector(rearrange(state, "b d h w -> b h w d"))
        wanted = rearrange(features, "b d h w -> b h w d")
        # in float32: squares of features overflow in 16 bits
        return -(F.normalize(projected.float(), dim=-1) * F.normalize(wanted.float(), dim=-1)).sum(-1).mean()

    def idle(self) -> Tensor:
        """Return 0 with a gradient of 0 for each parameter, which processes that train together wait for."""
        return 0 * sum(parameter.sum() for parameter in self.parameters())
