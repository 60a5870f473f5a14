"""Regularisers of the first stage's latent space: L_reg of arXiv 2112.10752, Eq. 25 and App. G.

KL: h holds the moments of q(z|x) = N(mu, sigma^2); the loss is its divergence from N(0, I). VQ: z = h, and the decoder
replaces each vector by the nearest entry of its codebook, so that diffusion models learn z before quantisation.
Legend: h encoder output after quant_conv, z latent, e codebook (n, d), z_q quantised latent.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from ldm.aliases import Noise
from ldm.bounds import NonNegative, Size
from ldm.errors import UserError

Info = dict[str, Tensor]

# Number of distances in memory at a time in the search for the nearest code: 64 MiB in float32.
SEARCH_BUDGET = 2**24


class Regularizer(Protocol):
    """What an Autoencoder needs of its regulariser, an nn.Module.

    double_z: whether h has two channels per latent channel.
    """

    double_z: bool

    def __call__(self, h: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Return the z to decode in training, the loss (scalar), and values to log."""

    def latent(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the z that a diffusion model learns."""

    def mode(self, h: Tensor) -> Tensor:
        """Return the most probable z, without noise."""

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Return z as the decoder takes it: quantised if there is a codebook."""


def float32_or_wider(x: Tensor) -> Tensor:
    """Return half-precision tensors as float32 and others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class DiagonalGaussian:
    """The distribution N(mean, diag(exp(logvar))), from moments (B, 2C, ...) stacked along the channels.

    The log variance is clamped to [-30, 20], and 0 is the variance if `deterministic`. Computes in float32 at least.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = float32_or_wider(parameters)
        self.deterministic = deterministic
        self.mean, logvar = self.parameters.chunk(2, dim=1)  # (B, C, ...) each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()

    def sample(self, noise: Noise | None = None) -> Tensor:
        """Return mean + std * noise(shape): (B, C, ...). The noise is from torch's generator by default."""
        if noise is None:
            return self.mean + self.std * torch.randn_like(self.mean)
        return self.mean + self.std * noise(tuple(self.mean.shape)).to(self.mean)

    def mode(self) -> Tensor:
        """Return the mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Return KL(self, other), other being N(0, I) by default: (B,); a single 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() / other.var
            terms = distance + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return -log density of `sample`, summed over `dims`; a single 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=list(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Return KL(N(mean1, exp logvar1), N(mean2, exp logvar2)) elementwise; arguments broadcast, numbers are allowed."""
    like = next(value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor))
    logvar1, logvar2 = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (logvar1, logvar2))
    distance = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + distance)


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """Return how often each code occurs: (num_codes,), int64."""
    flat = indices.flatten()
    counts = torch.zeros(num_codes, dtype=torch.int64, device=flat.device)
    return counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int64))


def perplexity_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(entropy) of counts (num_codes,), scalar in 1..num_codes, and how many are not 0 (int64)."""
    share = counts / counts.sum()
    return torch.exp(-(share * torch.log(share + 1e-10)).sum()), (counts > 0).sum()


def measure_perplexity(indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Return exp(entropy) of how often each code occurs (scalar, 1..num_codes), and how many codes occur (int64)."""
    return perplexity_of(count_codes(indices, num_codes))


class KL(nn.Module):
    """Sample z from N(mu, sigma^2); the loss is KL(N(mu, sigma^2), N(0, I)), summed over C, H, W, averaged over B."""

    double_z = True

    def forward(self, h: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Map moments (B, 2C, H, W) to a sample (B, C, H, W), the loss and {"posterior_std"}."""
        posterior = DiagonalGaussian(h)
        loss = posterior.kl().sum() / h.shape[0]
        return posterior.sample(noise), loss, {"posterior_std": posterior.std.detach().mean()}

    def latent(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return a sample, as in the paper, not the mean."""
        return DiagonalGaussian(h).sample(noise)

    def mode(self, h: Tensor) -> Tensor:
        """Return the mean."""
        return DiagonalGaussian(h).mode()

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Return z."""
        return z


class Identity(nn.Module):
    """No regularisation: z = h, loss 0."""

    double_z = False

    def forward(self, h: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Return h, 0 and nothing to log."""
        return h, torch.zeros((), device=h.device), {}

    def latent(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return h."""
        return h

    def mode(self, h: Tensor) -> Tensor:
        """Return h."""
        return h

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Return z."""
        return z


class VectorQuantizer(VectorQuantizer2):
    """Replace every position of z by the nearest of num_codes learned vectors of size dim.

    Loss: ||sg(z_q) - z||^2 + beta ||z_q - sg(z)||^2, means over all elements. Names of parameters and the handling of
    remapped indices are taming's; the search is our own.

    Args:
        num_codes, dim: n and d of the codebook.
        beta: weight of the codebook term, as in the released models.
        remap: a .npy file with the codes in use; indices then count within it. UserError if there is no such file.
        unknown_index: index of all other codes: "random", "extra" or a number.
        sane_index_shape: indices (B, H, W) instead of flat.
        legacy: False puts beta on the commitment term ||sg(z_q) - z||^2 instead, as in the paper of VQ-VAE.
    """

    double_z = False

    def __init__(
        self,
        num_codes: Size,
        dim: Size,
        beta: NonNegative = 0.25,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        if remap is not None and not Path(remap).is_file():
            raise UserError(f"VectorQuantizer.remap: no file {remap}; give a .npy file with the indices in use")
        super().__init__(num_codes, dim, beta, remap, unknown_index, sane_index_shape, legacy)

    def forward(self, z: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor, Info]:
        """Map (B, dim, H, W) to z_q with straight-through gradient, the loss and info.

        Info has perplexity and usage in this batch, indices (remapped), codes (flat, not remapped) and z.
        """
        codes = self.nearest(z)
        entries = self._entries(codes, z)
        wide_z, wide_entries = float32_or_wider(z), float32_or_wider(entries)
        commitment = (wide_entries.detach() - wide_z).square().mean()
        codebook = (wide_entries - wide_z.detach()).square().mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        perplexity, usage = measure_perplexity(codes, self.n_e)
        info = {"indices": self._public_indices(codes, z.shape), "perplexity": perplexity, "usage": usage}
        info |= {"codes": codes, "z": wide_z.detach()}
        return _straight_through(z, entries), loss, info

    def latent(self, h: Tensor, noise: Noise | None = None) -> Tensor:
        """Return h: quantisation is part of the decoder."""
        return h

    def mode(self, h: Tensor) -> Tensor:
        """Return h."""
        return h

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Return the nearest codebook entries (B, dim, H, W) with straight-through gradient."""
        return _straight_through(z, self._entries(self.nearest(z), z))

    def codes(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the entries for indices: (..., dim), or (B, dim, H, W) if shape = (B, H, W, dim) is given."""
        if self.remap is not None:
            # A copy, because taming sets unknown indices to 0 in place.
            indices = self.unmap_to_all(indices.reshape(1, -1).clone()).reshape(indices.shape)
        entries = self.embedding(indices)
        return entries if shape is None else rearrange(entries.reshape(tuple(shape)), "b h w c -> b c h w")

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return argmin_j ||z - e_j||^2 for each position of (B, dim, H, W): (B*H*W,); in chunks of positions."""
        with torch.autocast(z.device.type, enabled=False):
            flat = float32_or_wider(rearrange(z, "b c h w -> (b h w) c"))
            codebook = float32_or_wider(self.embedding.weight).to(flat.dtype)
            squares = codebook.square().sum(dim=1)
            chunks = flat.split(max(1, SEARCH_BUDGET // self.n_e))
            return torch.cat([_distances(chunk, codebook, squares).argmin(dim=1) for chunk in chunks])

    def _entries(self, codes: Tensor, z: Tensor) -> Tensor:
        """Return the entries for flat codes (B*H*W,) in the shape of z."""
        b, _, height, width = z.shape
        return rearrange(self.embedding(codes), "(b h w) c -> b c h w", b=b, h=height, w=width)

    def _public_indices(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Return flat codes in taming's shapes: (B*H*W, 1) with a remap, (B, H, W) with sane_index_shape."""
        if self.remap is not None:
            codes = self.remap_to_used(codes.reshape(shape[0], -1)).reshape(-1, 1)
        return codes.reshape(shape[0], *shape[2:]) if self.sane_index_shape else codes

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Return the positions of inds (B, N) within the codes in use."""
        used = self.used.to(inds)
        ranks = torch.arange(len(used), dtype=inds.dtype, device=inds.device)
        # Codes out of use keep the rank len(used); of equal entries the first counts.
        position = torch.full((self.n_e,), len(used), dtype=inds.dtype, device=inds.device)
        new = position.scatter_reduce(0, used, ranks, reduce="amin")[inds]
        if self.unknown_index == "random":
            replacement = torch.randint(self.re_embed, new.shape, dtype=new.dtype, device=new.device)
        else:
            replacement = torch.full_like(new, self.unknown_index)
        return torch.where(new == len(used), replacement, new)


def _straight_through(z: Tensor, entries: Tensor) -> Tensor:
    """Return the entries, with a gradient that passes to z unchanged."""
    return z + (entries.detach().to(z.dtype) - z).detach()


def _distances(z: Tensor, codebook: Tensor, squares: Tensor) -> Tensor:
    """Return ||z_i||^2 + ||e_j||^2 - 2 z_i e_j for (N, d) and (n, d): (N, n), rounded as in taming."""
    # On GPUs the product runs in float64: where TF32 is allowed, a float32 product would pick wrong codes.
    wide = torch.float64 if z.is_cuda else z.dtype
    products = (z.to(wide) @ codebook.to(wide).T).to(z.dtype)
    return (z.square().sum(dim=1, keepdim=True) + squares).sub_(products, alpha=2)
