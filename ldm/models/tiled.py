"""A latent diffusion model that works on overlapping tiles: first stage and denoiser, for images of any size.

Both are convolutional, so that they apply to larger maps than they were trained on (section 4.3.2); tile by tile,
memory does not grow with the image, and attention and normalisation see maps of the size of the training images.
Outputs of neighbouring tiles are blended at every step by `ldm.networks.tiling`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.aliases import Noise
from ldm.conditioning.base import Conditioner, Conditioning
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.conditional_network import ConditionalNetwork
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.networks.backbone import Backbone
from ldm.networks.tiling import FoldUnfold, TileSpec, blend, tiled

Module = TypeVar("Module", bound=nn.Module)


def tile(model: LatentDiffusion, side: int, contexts_for: tuple[int, int] | None = None) -> LatentDiffusion:
    """Return a copy of a model that shares its weights and works on tiles of `side` pixels that overlap by half.

    contexts_for: (height, width) of the images, where each tile has its own condition: entries of the batch are
    (B, tiles, ...), in the order of `tile_boxes`. UserError for a side that the model cannot have.
    """
    multiple = model.side_multiple
    if side < multiple or side % multiple:
        raise UserError(f"tile {side}: tiles of this model need a side that is a multiple of {multiple} pixels")
    positions = side // model.first_stage_model.factor
    copied = _shallow_copy(model)
    copied.model = TiledNetwork(model.model, positions, contexts_differ=contexts_for is not None)
    if not isinstance(model.first_stage_model, IdentityAutoencoder):
        copied.first_stage_model = TiledAutoencoder(model.first_stage_model, positions)
        if model.cond_stage_model is not None:
            copied.cond_stage_model = _copied_conditioner(model.cond_stage_model)
            copied.cond_stage_model.use_first_stage(copied.first_stage_model)
    if contexts_for is not None:
        num_tiles = len(tile_boxes(model, side, contexts_for))
        copied.cond_stage_model = TiledConditioner(copied.cond_stage_model, num_tiles)
    return copied


def tile_boxes(model: LatentDiffusion, side: int, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """List the tiles on images of `size`: left, top, width, height as fractions of the image."""
    height, width = (length // model.first_stage_model.factor for length in size)
    tiles = FoldUnfold(_halfway(side // model.first_stage_model.factor), height, width)
    down, across = tiles.kernel
    return [(left / width, top / height, across / width, down / height) for top, left in tiles.positions]


def _halfway(side: int) -> TileSpec:
    return TileSpec(side, max(1, side // 2))


def _shallow_copy(module: Module) -> Module:
    """Return a module with the same weights, whose children can be replaced without a change in the original."""
    copied = copy.copy(module)
    copied._modules, copied._buffers = dict(module._modules), dict(module._buffers)
    return copied


def _copied_conditioner(conditioner: Module) -> Module:
    """Copy a conditioner and those in it, down to the modules that hold the weights."""
    copied = _shallow_copy(conditioner)
    for name, child in conditioner.named_children():
        if isinstance(child, Conditioner):
            copied._modules[name] = _shallow_copy(child)
    return copied


class TiledAutoencoder(nn.Module):
    """Encode and decode by tiles of `side` positions of the latent that overlap by half.

    It shares the autoencoder's weights and owns none. Distributions are blended, not samples of them, and z is
    quantised before it is cut.
    """

    def __init__(self, autoencoder: Autoencoder, side: int) -> None:
        super().__init__()
        self._inner = (autoencoder,)  # in a tuple: as a child it would give its weights second names
        self.factor = autoencoder.factor
        self.in_channels, self.latent_channels = autoencoder.in_channels, autoencoder.latent_channels
        self.architecture = autoencoder.architecture
        spec = _halfway(side)
        pixels = TileSpec(side * self.factor, spec.stride[0] * self.factor)
        self.moments = tiled(autoencoder.moments, pixels, down=self.factor)
        self._decode = tiled(partial(autoencoder.decode, quantize=False), spec, up=self.factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latent of a height x width image; UserError unless f divides both."""
        return self._inner[0].latent_shape(height, width)

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return latents (B, C, H/f, W/f) of images (B, in_channels, H, W)."""
        return self._inner[0].quantize.latent(self.moments(x), noise)

    def encode_mode(self, x: Tensor) -> Tensor:
        """Return the latents without noise."""
        return self._inner[0].quantize.mode(self.moments(x))

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Map latents (B, C, h, w) to images (B, out_channels, f*h, f*w); quantize: z first (VQ)."""
        return self._decode(self._inner[0].quantize.nearest_codes(z) if quantize else z)


class TiledNetwork(nn.Module):
    """Denoise tile by tile; an image that is concatenated is cut alike.

    A context of cross-attention is given to every tile, unless `contexts_differ`: then it holds, one after the other,
    the tokens of each tile, as `TiledConditioner` makes them.
    """

    def __init__(self, network: ConditionalNetwork, side: int, contexts_differ: bool = False) -> None:
        """Take a network that is called with (x, t, conditioning); side: of a tile, in positions of x."""
        super().__init__()
        self.network = network
        self.spec = _halfway(side)
        self.contexts_differ = contexts_differ

    @property
    def diffusion_model(self) -> Backbone:
        """Return the backbone."""
        return self.network.diffusion_model

    def wrapped(self, wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> TiledNetwork:
        """Return the same over what `wrap` makes of the backbone, which sees one tile after the other."""
        copied = _shallow_copy(self)
        copied.network = self.network.wrapped(wrap)
        return copied

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Run the network on x (B, C, H, W) and steps t (B,)."""
        concat = None if conditioning is None else conditioning.concat
        if concat is not None and concat.shape[2:] not in {(1, 1), x.shape[2:]}:
            return self.network(x, t, conditioning)  # which says what is wrong
        tiles = FoldUnfold(self.spec, *x.shape[2:])
        each = range(len(tiles.positions))
        return blend(tiles, (self.network(tiles.crop(x, i), t, self._part(conditioning, tiles, i)) for i in each))

    def _part(self, conditioning: Conditioning | None, tiles: FoldUnfold, i: int) -> Conditioning | None:
        """Return the condition of tile i."""
        if conditioning is None:
            return None
        concat, context = conditioning.concat, conditioning.context
        if concat is not None and concat.shape[2:] != (1, 1):
            concat = tiles.crop(concat, i)
        if self.contexts_differ and context is not None:
            context = context.chunk(len(tiles.positions), dim=1)[i]  # (B, L, D)
        return replace(conditioning, concat=concat, context=context)


class TiledConditioner(nn.Module):
    """Embed conditions that differ from tile to tile: entries of the batch are (B, number of tiles, ...)."""

    def __init__(self, conditioner: Conditioner, num_tiles: int) -> None:
        super().__init__()
        self.conditioner, self.num_tiles, self.drop_rate = conditioner, num_tiles, conditioner.drop_rate

    def forward(self, batch: Mapping[str, Tensor], drop: Tensor | None = None) -> Conditioning:
        """Return the contexts of all tiles, one after the other: (B, tiles * L, D)."""
        parts = [{key: entry[:, i] for key, entry in batch.items()} for i in range(self.num_tiles)]
        return Conditioning(context=torch.cat([self.conditioner(part, drop).context for part in parts], dim=1))

    def unconditional(self, n: int, batch: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Return n samples without condition, in every tile."""
        return Conditioning(context=self.conditioner.unconditional(n).context.repeat(1, self.num_tiles, 1))
