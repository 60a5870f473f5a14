"""What the tests of the first stage share."""

from collections.abc import Callable

import pytest
import torch

from ldm.autoencoder.regularizers import KL, Regularizer, VectorQuantizer
from ldm.models.autoencoder import Autoencoder
from ldm.networks.encoder_decoder import Architecture

TINY = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "resolution": 16}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def make() -> Callable[..., Autoencoder]:
    """Give a builder of tiny autoencoders with f = 2 and three latent channels."""

    def build(regularizer: Regularizer | None = None, **options: bool) -> Autoencoder:
        regularizer = KL() if regularizer is None else regularizer
        return Autoencoder(Architecture(**TINY), regularizer, embed_dim=3, **options).eval()

    return build


@pytest.fixture
def kl(make) -> Autoencoder:
    """Give a KL-regularised autoencoder."""
    return make()


@pytest.fixture
def vq(make) -> Autoencoder:
    """Give a vector-quantised autoencoder whose codes are as far apart as its latents."""
    quantizer = VectorQuantizer(16, 3)
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
    return make(quantizer)
