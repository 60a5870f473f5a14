"""The patch discriminator D_psi of the first stage's adversarial loss (arXiv 2112.10752, Eq. 25; PatchGAN of pix2pix).

Each output is the logit that one of the overlapping patches is real; with 3 layers a patch has 70 x 70 pixels.
"""

from functools import partial

from taming.modules.discriminator.model import NLayerDiscriminator
from taming.modules.util import ActNorm
from torch import Tensor, nn

from ldm.bounds import Depth, NonNegative, Size
from ldm.networks.synchronized import SynchronizedActNorm, SynchronizedBatchNorm2d


class PatchDiscriminator(NLayerDiscriminator):
    """Classify patches of an image as real or reconstructed; parameters are named `main.*` as in the released models.

    num_layers strided convolutions of width * (1, 2, 4, 8, 8, ...) channels, with ActNorm instead of BatchNorm if
    actnorm. init_std: standard deviation of the initial weights, None for torch's own. synchronized: BatchNorm
    normalises over the batches of all ranks instead of each rank's own, which is the original's way.
    """

    def __init__(
        self,
        in_channels: Size = 3,
        width: Size = 64,
        num_layers: Depth = 3,
        actnorm: bool = False,
        init_std: NonNegative | None = 0.02,
        synchronized: bool = False,
    ) -> None:
        super().__init__(in_channels, width, num_layers, actnorm)
        for i, layer in enumerate(self.main):
            if isinstance(layer, ActNorm):
                self.main[i] = SynchronizedActNorm(layer.loc.shape[1])
            elif synchronized and isinstance(layer, nn.BatchNorm2d):
                self.main[i] = SynchronizedBatchNorm2d(layer.num_features)
        if init_std is not None:
            self.apply(partial(_init_normal, std=init_std))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), positive for real, of (B, in_channels, H, W), with h = H / 2^num_layers - 2."""
        return super().forward(x)


def _init_normal(module: nn.Module, std: float) -> None:
    """Draw weights of convolutions from N(0, std^2) and of batch norms from N(1, std^2); biases of norms are 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, std)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, std)
        nn.init.zeros_(module.bias)
