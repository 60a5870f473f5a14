"""Features of the small network that ships with the project, for generated scenes and tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.evaluation.extractors import Features, NetworkExtractor
from ldm.toy.scene_network import SCENE_MAP, SIDE, SceneFeatures, SceneNetwork
from ldm.weights.load import load_into

SCENE_WEIGHTS = Path(__file__).parent / "weights" / "scenenet.safetensors"


class SceneNet(NetworkExtractor):
    """Features of `ldm.toy.scene_network.SceneNetwork`: 64 pooled, 18 logits, 24x4x4 spatial."""

    name = "scenenet"
    width, grid = SCENE_MAP[0], SCENE_MAP[1:]  # of its patches
    resize = f"antialiased bilinear to {SIDE}x{SIDE}"

    def __init__(self, weights: str | Path = SCENE_WEIGHTS) -> None:
        super().__init__()
        self.weights = Path(weights)

    def _build(self) -> nn.Module:
        if not self.weights.is_file():
            raise UserError(f"scenenet: no weights at {self.weights}; make them with scripts/train_scene_network.py")
        network = SceneNetwork()
        load_into(network, self.weights)
        return network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return features of images, uint8 (B, 3, H, W)."""
        found = self._found(self._checked(images).float() / 127.5 - 1)
        coarse = F.avg_pool2d(found.map[:, :24], 2)  # (B, 24, 4, 4)
        return Features(found.features.cpu(), found.logits.cpu(), coarse.flatten(1).cpu())

    @torch.no_grad()
    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the map of features (B, 72, 8, 8) of images (B, C, H, W) in [-1, 1]."""
        return self._found(self._in_colour(images)).map.float()

    def _found(self, x: Tensor) -> SceneFeatures:
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.network(x)


def save_weights(network: SceneNetwork, path: Path) -> None:
    """Write weights in half precision, whose rounding is part of the definition of the features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, path)
