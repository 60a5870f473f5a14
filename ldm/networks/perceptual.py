"""LPIPS, the perceptual distance of the first stage's reconstruction loss (Zhang et al. 2018, arXiv 1801.03924).

Both images go through VGG16; after each of five stages the features are normalised over channels, and
    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2
with weights w fitted to human judgements. All weights are frozen. Modules and fitted weights are those of the `lpips`
package, state-dict names those of the published autoencoder checkpoints.
"""

import logging
import warnings
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.weights.load import read

log = logging.getLogger(__name__)

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"
CHANNELS = (64, 128, 256, 512, 512)
MIN_SIZE = 16  # VGG16 halves four times before its last stage


class LPIPS(nn.Module):
    """Perceptual distance of two images.

    Weights are those of a loaded state dict, else they are read at the first use; nothing is downloaded.

    Args:
        weights: torchvision's vgg16-397923af.pth, by default in torch's hub cache. UserError at the first use if there
            is no such file.
        random_features: random weights of VGG16, equal in every run: a crude metric, for tests and demos.
    """

    def __init__(self, weights: str | None = None, random_features: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.random_features = random_features
        self._is_ready = False
        device = torch.empty(0).device  # "meta" where a caller asked for it
        with torch.device("meta"):  # VGG16's classifier, half a gigabyte, is never made
            self._build()
        self.to_empty(device=device)
        self._reset()
        self.eval()

    def _build(self) -> None:
        from lpips.lpips import NetLinLayer, ScalingLayer
        from lpips.pretrained_networks import vgg16

        self.scaling_layer = ScalingLayer()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self.net = vgg16(pretrained=False)
        for i, channels in enumerate(CHANNELS):
            self.add_module(f"lin{i}", NetLinLayer(channels, use_dropout=True))

    @torch.no_grad()
    def _reset(self) -> None:
        """Set the constants of the input's scaling, and all weights to 0, which means not yet loaded."""
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()
        for name, values in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            buffer = self.scaling_layer.get_buffer(name)
            buffer.copy_(torch.tensor(values, device=buffer.device).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode: dropout would make the distance random."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of images (B, C, H, W) in [-1, 1]: (B, 1, 1, 1), 0 for equal ones.

        Unless C is 3, each channel is compared as a grey image, and the distances are averaged. UserError for sides
        below 16.
        """
        if min(x.shape[-2:]) < MIN_SIZE:
            raise UserError(f"LPIPS: images of {x.shape[-2]}x{x.shape[-1]}; it needs sides of at least {MIN_SIZE}")
        if not self._is_ready:
            self._load()
        with torch.autocast(x.device.type, enabled=False):
            if x.shape[1] not in (1, 3):
                distances = self._distance(x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None])
                return distances.view(*x.shape[:2], 1, 1).mean(dim=1, keepdim=True)
            return self._distance(x, y)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = self.scaling_layer.shift.dtype
        total = 0.0
        pairs = zip(self._features(x.to(dtype)), self._features(y.to(dtype)), strict=True)
        for i, (fx, fy) in enumerate(pairs):
            difference = (fx - fy).square()  # (B, C_l, H_l, W_l)
            total = total + self.get_submodule(f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return the five normalised feature maps."""
        stages = self.net(self.scaling_layer(x))
        # Unlike sqrt(sum of squares), the norm has a gradient (0) where all features are 0.
        return [f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in stages]

    @torch.no_grad()
    def _load(self) -> None:
        """Set the weights that no state dict has set."""
        if not any(bool(p.any()) for p in self.net.parameters()):
            self._draw_vgg() if self.random_features else self._read_vgg()
        lin = [self.get_submodule(f"lin{i}").model[1].weight for i in range(len(CHANNELS))]
        if not any(bool(weight.any()) for weight in lin):
            # Fitted weights mean nothing for random features, which all have weight 1.
            values = [torch.ones_like(weight) for weight in lin] if self.random_features else _read_fitted_weights()
            for weight, value in zip(lin, values, strict=True):
                weight.copy_(value)
        self._is_ready = True

    def _read_vgg(self) -> None:
        default = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
        path = default if self.weights is None else Path(self.weights)
        if not path.is_file():
            remedy = "or name another file in LPIPS.weights" if self.weights is None else "or correct LPIPS.weights"
            raise UserError(f"LPIPS: no VGG16 weights at {path}; fetch {VGG16_URL} to there {remedy}")
        log.info("LPIPS: VGG16 weights from %s", path)
        state = read(path)
        for name, parameter in self.net.named_parameters():
            key = f"features.{name.split('.', 1)[1]}"  # slice2.5.weight -> features.5.weight
            if key not in state or state[key].shape != parameter.shape:
                raise UserError(f"LPIPS: {path} is not torchvision's VGG16 (see its {key}); fetch {VGG16_URL}")
            parameter.copy_(state[key])

    def _draw_vgg(self) -> None:
        """Draw weights as He et al. 2015, from a generator of its own."""
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.net.named_parameters():
            if name.endswith("weight"):
                std = (2.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def _read_fitted_weights() -> list[Tensor]:
    """Return the weights fitted to human judgements, (1, C_l, 1, 1) for each stage, which the lpips package carries."""
    with as_file(files("lpips") / "weights" / "v0.1" / "vgg.pth") as path:
        state = read(path)
    return [state[f"lin{i}.model.1.weight"] for i in range(len(CHANNELS))]
