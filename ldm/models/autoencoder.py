"""The first stage: z = E(x), x_rec = D(z), with sides f times smaller (arXiv 2112.10752, Sec. 3.1, App. G).

Images are in [-1, 1]. The scale that diffusion models apply to z is not part of the autoencoder. Child names are those
of the published checkpoints: encoder, decoder, quantize, quant_conv, post_quant_conv.
"""

from torch import Tensor, nn

from ldm.aliases import Noise
from ldm.autoencoder.regularizers import DiagonalGaussian, Info, Regularizer
from ldm.bounds import Size
from ldm.errors import UserError
from ldm.networks.encoder_decoder import Architecture, Decoder, Encoder

_MOST_PIXELS = 2**31  # of an image; more is a slip of the fingers


class Autoencoder(nn.Module):
    """Encoder, regulariser and decoder; latents have embed_dim channels."""

    def __init__(
        self,
        architecture: Architecture,
        regularizer: Regularizer,
        embed_dim: Size,
        tanh_out: bool = False,
        has_quant_convs: bool = True,
    ) -> None:
        """Build both networks.

        tanh_out: end the decoder in tanh. has_quant_convs: map z_channels to embed_dim and back; UserError without it
        unless these are equal.
        """
        super().__init__()
        if not has_quant_convs and embed_dim != architecture.z_channels:
            raise UserError(
                f"Autoencoder: embed_dim is {embed_dim} and z_channels {architecture.z_channels}; without quant_convs "
                "they must be equal"
            )
        stacked = 2 if regularizer.double_z else 1
        self.architecture = architecture
        self.latent_channels = embed_dim
        self.encoder = Encoder(architecture, double_z=regularizer.double_z)
        self.decoder = Decoder(architecture, tanh_out=tanh_out)
        self.quantize = regularizer
        conv = nn.Conv2d if has_quant_convs else nn.Identity
        self.quant_conv = conv(stacked * architecture.z_channels, stacked * embed_dim, 1)
        self.post_quant_conv = conv(embed_dim, architecture.z_channels, 1)

    @property
    def in_channels(self) -> int:
        """Return the number of channels of images."""
        return self.architecture.in_channels

    @property
    def factor(self) -> int:
        """Return the downsampling factor f."""
        return self.architecture.factor

    @property
    def side_multiple(self) -> int:
        """Return the number that must divide the sides of an image."""
        return self.factor

    @property
    def last_layer(self) -> nn.Parameter:
        """Return the weight whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latent of a height x width image; UserError unless f divides both."""
        f = self.factor
        if height * width > _MOST_PIXELS:
            raise UserError(f"image size {height}x{width}: use at most {_MOST_PIXELS:,} pixels")
        if height < f or width < f or height % f or width % f:
            nearest = sorted({f * max(1, side // f + up) for side in (height, width) if side % f for up in (0, 1)})
            raise UserError(
                f"image size {height}x{width}: each side must be a multiple of {f}; "
                f"the nearest are {', '.join(map(str, nearest or [f]))}"
            )
        return self.latent_channels, height // f, width // f

    def moments(self, x: Tensor) -> Tensor:
        """Return the regulariser's input for images (B, in_channels, H, W): (B, 2C or C, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """Return q(z|x). TypeError if the regulariser has no such distribution."""
        if not self.quantize.double_z:
            raise TypeError(f"{type(self.quantize).__name__} has no posterior")
        return DiagonalGaussian(self.moments(x))

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the latents that diffusion models learn: a sample (KL), or z before quantisation (VQ)."""
        return self.quantize.latent(self.moments(x), noise)  # (B, C, H/f, W/f)

    def encode_mode(self, x: Tensor) -> Tensor:
        """Return the latents without noise: the mean (KL), or z before quantisation (VQ)."""
        return self.quantize.mode(self.moments(x))

    def latent_from_moments(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return latents from (cached) moments, with new noise."""
        return self.quantize.latent(h, noise)

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Return images (B, out_channels, f*h, f*w) for latents (B, C, h, w); quantize: z first (VQ)."""
        z = self.quantize.nearest_codes(z) if quantize else z
        # Samplers compute z in float32, even for weights in half precision.
        return self.decoder(self.post_quant_conv(z.to(self.last_layer.dtype)))

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Return the reconstruction, the regulariser's loss (scalar) and its values to log."""
        z, loss, info = self.quantize(self.moments(x), noise)
        return self.decode(z, quantize=False), loss, info


class IdentityAutoencoder(nn.Module):
    """The first stage of diffusion on pixels: f = 1, z = x."""

    factor = 1

    def __init__(self, channels: Size = 3) -> None:
        super().__init__()
        self.in_channels = self.latent_channels = channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        return self.latent_channels, height, width

    def moments(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return x."""
        return x

    def encode_mode(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def latent_from_moments(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return h."""
        return h

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Return z."""
        return z

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Return x, a zero loss and nothing to log."""
        return x, x.new_zeros(()), {}
