"""The small feature network that ships with the project, and its training on generated scenes.

It is to the toys what Inception is to ImageNet: fixed features in which distributions of images can be compared. Four
convolutional stages process an image of 32x32; 64 features are computed from the last two maps, layout included. From
these features alone it learns which of the 18 kinds of thing a scene (`ldm.toy.shapes`) shows, their sizes and
positions, and the strength of one of four defects (blur, noise, coarse blocks, tint), so that the features change with
content and with the defects that first stages and samplers cause. They mean little for images that are no scenes.

    python scripts/train_scene_network.py        # writes ldm/toy/weights/scenenet.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.core.loader import collate
from ldm.toy.captions import COLOURS, SHAPES
from ldm.toy.shapes import Shapes

NUM_KINDS = len(SHAPES) * len(COLOURS)
NUM_FEATURES = 64
SIDE = 32
_WIDTHS = (24, 48, 72, 96)
SCENE_MAP = (_WIDTHS[-2], SIDE // 4, SIDE // 4)  # channels and sides of the map of features
_PLACE = 4  # centre and extents of a thing's box


class SceneFeatures(NamedTuple):
    """Features (B, 64), logits of the kind of thing (B, 18), a map between them (B, 72, 8, 8)."""

    features: Tensor
    logits: Tensor
    map: Tensor


class SceneNetwork(nn.Module):
    """Network from images (B, 3, 32, 32) in [-1, 1] to features and logits."""

    def __init__(self) -> None:
        super().__init__()
        ins = (3, *_WIDTHS[:-1])
        self.stages = nn.ModuleList(
            _stage(below, width, 1 if below == 3 else 2) for below, width in zip(ins, _WIDTHS, strict=True)
        )
        self.squeeze = nn.ModuleList([nn.Conv2d(_WIDTHS[-2], 8, 1), nn.Conv2d(_WIDTHS[-1], 16, 1)])
        self.features = nn.Sequential(
            nn.Linear(3 * 16 + 8 * 64 + 16 * 16, 128), nn.SiLU(), nn.Linear(128, NUM_FEATURES)
        )
        self.kind = nn.Linear(NUM_FEATURES, NUM_KINDS)
        self.place = nn.Linear(NUM_FEATURES, NUM_KINDS * _PLACE)
        self.defect = nn.Linear(NUM_FEATURES, len(DEFECTS))

    def forward(self, x: Tensor) -> SceneFeatures:
        """Return features of images."""
        maps, colours = [], F.adaptive_avg_pool2d(x, 4).flatten(1)  # the stages' normalisation hides mean colours
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        parts = [squeeze(h).flatten(1) for squeeze, h in zip(self.squeeze, maps[-2:], strict=True)]
        features = self.features(torch.cat([colours, *parts], dim=1))  # (B, 64)
        return SceneFeatures(features, self.kind(F.silu(features)), maps[-2])

    def loss(self, x: Tensor, kinds: Tensor, places: Tensor, defects: Tensor) -> Tensor:
        """Return the loss of images with what they show.

        kinds (B, 18), 1 where there is such a thing; places (B, 18, 4); defects (B, 4), their strengths in [0, 1].
        """
        found = self(x)
        h = F.silu(found.features)
        wanted = kinds / kinds.sum(1, keepdim=True)
        kind = F.cross_entropy(found.logits, wanted)
        off = (self.place(h).unflatten(1, (NUM_KINDS, _PLACE)) - places).abs().mean(2)  # (B, 18)
        place = (off * kinds).sum() / kinds.sum()
        return kind + 4 * place + 2 * F.mse_loss(self.defect(h), defects)


def _stage(below: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(below, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
    )  # fmt: skip


def _blurred(x: Tensor, noise: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def _noisy(x: Tensor, noise: Tensor) -> Tensor:
    return x + 0.5 * noise


def _blocky(x: Tensor, noise: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0)


def _tinted(x: Tensor, noise: Tensor) -> Tensor:
    return x + 0.5 * noise.mean((2, 3), keepdim=True).sign()


DEFECTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_blurred, _noisy, _blocky, _tinted)


def with_defects(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images, half of them with one defect of random strength, and the strengths (B, 4)."""
    which = torch.randint(len(DEFECTS), (len(x),), generator=generator)
    strength = torch.rand(len(x), generator=generator) * (torch.rand(len(x), generator=generator) < 0.5)
    noise = torch.randn(x.shape, generator=generator)
    faulty = torch.stack([defect(x, noise) for defect in DEFECTS], dim=1)[torch.arange(len(x)), which]
    mixed = torch.lerp(x, faulty, strength.view(-1, 1, 1, 1)).clamp(-1, 1)
    return mixed, F.one_hot(which, len(DEFECTS)) * strength[:, None]


def train_scene_network(num_steps: int, num_scenes: int, seed: int = 0) -> tuple[SceneNetwork, Iterator[float]]:
    """Return a network and an iterator of losses, 64 scenes a step; each loss taken is one step of training."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = SceneNetwork()
    scenes = Shapes(num_scenes, SIDE, (1, 3), seed=977 + seed, fields=("boxes", "box_labels"))
    images, kinds, places = _targets(collate([scenes[i] for i in range(num_scenes)]))
    return network, _steps(network, (images, kinds, places), num_steps, torch.Generator().manual_seed(seed))


def _targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    boxes, labels = batch["boxes"], batch["box_labels"]  # (N, 3, 4), (N, 3)
    kinds, places = torch.zeros(len(labels), NUM_KINDS), torch.zeros(len(labels), NUM_KINDS, _PLACE)
    rows, things = (labels >= 0).nonzero(as_tuple=True)
    kinds[rows, labels[rows, things]] = 1
    places[rows, labels[rows, things]] = boxes[rows, things]
    return batch["image"], kinds, places


def _steps(
    network: SceneNetwork, data: tuple[Tensor, Tensor, Tensor], num_steps: int, generator: torch.Generator
) -> Iterator[float]:
    images, kinds, places = data
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    for _ in range(num_steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        x, defects = with_defects(images[chosen], generator)
        loss = network.loss(x, kinds[chosen], places[chosen], defects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def accuracy(network: SceneNetwork) -> float:
    """Return for how many of 1000 validation scenes the largest logit is a thing of the scene."""
    scenes = Shapes(1000, SIDE, (1, 3), split="validation", fields=("box_labels",))
    batch = collate([scenes[i] for i in range(len(scenes))])
    guesses = network.eval()(batch["image"]).logits.argmax(1)
    return (batch["box_labels"] == guesses[:, None]).any(1).float().mean().item()
