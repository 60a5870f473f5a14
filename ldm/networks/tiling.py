"""Run a network on overlapping tiles of a large map and blend the results.

With tiles i, their outputs y_i and a weight w that falls towards a tile's border, the result is
    y = sum_i w y_i / sum_i w
at each position (arXiv 2112.10752, Sec. 4.3.2: super-resolution and large samples). Tiles cover the whole map: where
the stride does not divide it, the last tile is moved back to the edge.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ldm.errors import UserError
from ldm.transfer import sent


@dataclass(frozen=True)
class TileSpec:
    """Sides and strides of tiles, and their weights. UserError for gaps between tiles and for weights that may be 0.

    Args:
        kernel, stride: in positions of the input; one number for both axes, or (height, width).
        clip_min, clip_max: bounds of a weight, which is the distance to the tile's border, 0 to 0.5 of its side.
        tie_breaker: multiply by the distance, measured alike, of the tile to the border of the map of tiles.
        clip_min_tie, clip_max_tie: bounds of that distance.
    """

    kernel: int | Sequence[int]
    stride: int | Sequence[int]
    clip_min: float = 0.01
    clip_max: float = 0.5
    tie_breaker: bool = False
    clip_min_tie: float = 0.01
    clip_max_tie: float = 0.5

    def __post_init__(self) -> None:
        for name in ("kernel", "stride"):
            value = getattr(self, name)
            pair = (value, value) if isinstance(value, int) else tuple(value)
            if len(pair) != 2 or min(pair) < 1:
                raise UserError(f"TileSpec.{name}: {value}; give one positive number, or two (height, width)")
            object.__setattr__(self, name, pair)
        if any(stride > kernel for stride, kernel in zip(self.stride, self.kernel, strict=True)):
            raise UserError(f"TileSpec.stride: {self.stride} leaves gaps between tiles of {self.kernel}; reduce it")
        if min(self.clip_min, self.clip_min_tie) <= 0:
            raise UserError("TileSpec.clip_min and clip_min_tie must be positive: a border of weight 0 has no value")


def delta_border(height: int, width: int) -> Tensor:
    """Return each cell's relative distance to the nearest border, 0 at the border, 0.5 at the centre: (H, W)."""
    y, x = (_to_border(n) for n in (height, width))
    return torch.minimum(y[:, None], x[None, :])


def _to_border(n: int) -> Tensor:
    if n == 1:
        return torch.full((1,), 0.5)  # a single cell is the centre
    ramp = torch.arange(n) / (n - 1)
    return torch.minimum(ramp, 1 - ramp)


def weighting(spec: TileSpec, height: int, width: int, rows: int, columns: int) -> Tensor:
    """Return the weights of rows * columns tiles of height x width: (1, height * width, rows * columns)."""
    inner = delta_border(height, width).clamp(spec.clip_min, spec.clip_max).flatten()
    outer = torch.ones(rows * columns)
    if spec.tie_breaker:
        outer = delta_border(rows, columns).clamp(spec.clip_min_tie, spec.clip_max_tie).flatten()
    return (inner[:, None] * outer[None, :])[None]


class FoldUnfold:
    """Crop maps of one size to tiles, and add up tiles to maps with sides `up` / `down` times those of the input.

    weights (1, 1, kh', kw', L) and normalization (1, 1, H', W'), their sum, are for the output (primes: output size).
    Tiles are ordered row by row; a tile larger than the map shrinks to it. UserError unless `down` divides map, tile
    and stride.
    """

    def __init__(self, spec: TileSpec, height: int, width: int, up: int = 1, down: int = 1) -> None:
        self.kernel = tuple(min(k, n) for k, n in zip(spec.kernel, (height, width), strict=True))
        stride = tuple(min(s, n) for s, n in zip(spec.stride, (height, width), strict=True))
        for name, value in (("map", (height, width)), ("tile", self.kernel), ("stride", stride)):
            if value[0] % down or value[1] % down:
                raise UserError(f"tiles: {down} does not divide the sides {value} of the {name}; choose other sizes")
        ys, xs = (_starts(*axis) for axis in zip((height, width), self.kernel, stride, strict=True))
        self.positions = [(y, x) for y in ys for x in xs]  # top left corners, in the input
        self._resized = [(y * up // down, x * up // down) for y, x in self.positions]
        self.out_size = (height * up // down, width * up // down)
        self.out_kernel = (self.kernel[0] * up // down, self.kernel[1] * up // down)
        flat = weighting(spec, *self.out_kernel, len(ys), len(xs))
        self.weights = rearrange(flat, "1 (h w) l -> 1 1 h w l", h=self.out_kernel[0])
        self.normalization = self.fold(flat)

    def crop(self, x: Tensor, i: int) -> Tensor:
        """Return tile i of (B, C, H, W): (B, C, kh, kw)."""
        (top, left), (height, width) = self.positions[i], self.kernel
        return x[..., top : top + height, left : left + width]

    def add(self, total: Tensor, i: int, tile: Tensor) -> None:
        """Add the output (B, C, kh', kw') of tile i to `total` (B, C, H', W'), in place."""
        (top, left), (height, width) = self._resized[i], self.out_kernel
        total[..., top : top + height, left : left + width] += tile

    def unfold(self, x: Tensor) -> Tensor:
        """Return all tiles of (B, C, H, W) in the layout of torch.nn.Unfold: (B, C * kh * kw, L)."""
        return torch.stack([self.crop(x, i).flatten(1) for i in range(len(self.positions))], dim=-1)

    def fold(self, tiles: Tensor) -> Tensor:
        """Add up tiles (B, C * kh' * kw', L) to (B, C, H', W'), without weights."""
        height, width = self.out_kernel
        tiles = rearrange(tiles, "b (c h w) l -> l b c h w", h=height, w=width)
        total = tiles.new_zeros(*tiles.shape[1:3], *self.out_size)
        for i, tile in enumerate(tiles):
            self.add(total, i, tile)
        return total


def _starts(size: int, kernel: int, stride: int) -> list[int]:
    """Return where tiles begin along one axis; the last one ends at the edge."""
    starts = list(range(0, size - kernel + 1, stride))
    return starts if starts[-1] + kernel == size else [*starts, size - kernel]


def tiled(fn: Callable[..., Tensor], spec: TileSpec, up: int = 1, down: int = 1) -> Callable[..., Tensor]:
    """Return a function that applies fn tile by tile, with memory independent of the size of the map.

    fn maps (B, C, kh, kw) to (B, C', kh * up / down, kw * up / down). The result takes (B, C, H, W) and further maps
    of the same H and W, whose tiles are further arguments of fn.
    """

    def run(x: Tensor, *maps: Tensor) -> Tensor:
        tiles = FoldUnfold(spec, *x.shape[-2:], up, down)
        each = range(len(tiles.positions))
        return blend(tiles, (fn(tiles.crop(x, i), *(tiles.crop(other, i) for other in maps)) for i in each))

    return run


def blend(tiles: FoldUnfold, outputs: Iterable[Tensor]) -> Tensor:
    """Blend the outputs (B, C, kh', kw') of all tiles in their order, one at a time: (B, C, H', W')."""
    total, dtype, weights = None, None, tiles.weights
    for i, y in enumerate(outputs):
        weights = sent(weights, y.device)  # once
        weighted = y * weights[..., i]  # float32 also for half-precision y
        total = weighted.new_zeros(*y.shape[:2], *tiles.out_size) if total is None else total
        tiles.add(total, i, weighted)
        dtype = y.dtype
    return (total / sent(tiles.normalization, total.device)).to(dtype)
