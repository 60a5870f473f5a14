"""The patch discriminator D_psi of the first stage's adversarial loss (arXiv 2112.10752, Eq. 25; PatchGAN of pix2pix).

Each output says how real one overlapping patch of the image is; with 3 layers a patch has 70 x 70 pixels.
"""

from functools import partial

from taming.modules.discriminator.model import NLayerDiscriminator
from taming.modules.util import ActNorm
from torch import Tensor, nn

from ldm.bounds import Count, Natural, NonNegative
from ldm.networks.synchronized import SynchronizedActNorm, SynchronizedBatchNorm2d


class PatchDiscriminator(NLayerDiscriminator):
    """Judge patches of an image; parameters are named `main.*` and initialised N(0, 0.02) as in the released models.

    num_layers strided convolutions of width * (1, 2, 4, 8, 8, ...) channels; ActNorm instead of BatchNorm if actnorm.
    init_std None leaves torch's own initial values. synchronized: BatchNorm sees the batches of all ranks instead of
    each rank's own, as the original has it.
    """

    def __init__(
        self,
        in_channels: Count = 3,
        width: Count = 64,
        num_layers: Natural = 3,
        actnorm: bool = False,
        init_std: NonNegative | None = 0.02,
        synchronized: bool = False,
    ) -> None:
        super().__init__(in_channels, width, num_layers, actnorm)
        for place, layer in enumerate(self.main):
            if isinstance(layer, ActNorm):
                self.main[place] = SynchronizedActNorm(layer.loc.shape[1])
            elif synchronized and isinstance(layer, nn.BatchNorm2d):
                self.main[place] = SynchronizedBatchNorm2d(layer.num_features)
        if init_std is not None:
            self.apply(partial(_init_normal, std=init_std))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to logits (B, 1, h, w), positive for real, with h = H / 2^num_layers - 2."""
        return super().forward(x)


def _init_normal(module: nn.Module, std: float) -> None:
    """Draw weights of convolutions from N(0, std^2) and of batch norms from N(1, std^2); biases of norms are 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, std)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, std)
        nn.init.zeros_(module.bias)
