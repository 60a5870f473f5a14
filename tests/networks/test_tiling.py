"""Tiles: weights in closed form, exact reconstruction for any size, agreement with untiled networks."""

import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.networks.tiling import FoldUnfold, TileSpec, delta_border, tiled, weighting


def test_distance_to_the_border():
    expected = torch.tensor([[0, 0, 0, 0, 0], [0, 0.25, 0.25, 0.25, 0], [0, 0.25, 0.5, 0.25, 0]])
    torch.testing.assert_close(delta_border(5, 5)[:3], expected)
    assert delta_border(1, 1) == 0.5
    assert delta_border(3, 1).flatten().tolist() == [0, 0.5, 0]


def test_weights_are_clipped_distances_and_central_tiles_count_more():
    spec = TileSpec(5, 5, clip_min=0.1, clip_max=0.3)
    flat = delta_border(5, 5).clamp(0.1, 0.3).flatten()
    torch.testing.assert_close(weighting(spec, 5, 5, 3, 4), flat.view(1, 25, 1).expand(1, 25, 12))
    tied = weighting(TileSpec(5, 5, 0.1, 0.3, True, 0.05, 0.4), 5, 5, 3, 3)
    torch.testing.assert_close(tied[0, :, 4], 0.4 * flat)
    torch.testing.assert_close(tied[0, :, 0], 0.05 * flat)


@pytest.mark.parametrize("size", [(16, 16), (13, 17), (8, 9), (5, 30)])
@pytest.mark.parametrize("tie_breaker", [False, True])
def test_identity_is_reconstructed_at_any_size(size, tie_breaker):
    x = torch.randn(2, 3, *size)
    spec = TileSpec((8, 8), (3, 5), tie_breaker=tie_breaker)
    torch.testing.assert_close(tiled(lambda tile: tile, spec)(x), x)


def test_layout_is_that_of_torch_where_the_stride_divides():
    x, spec = torch.randn(2, 3, 16, 12), TileSpec(8, 4)
    tiles = FoldUnfold(spec, 16, 12)
    assert torch.equal(tiles.unfold(x), F.unfold(x, 8, stride=4))
    torch.testing.assert_close(tiles.fold(tiles.unfold(x)), F.fold(F.unfold(x, 8, stride=4), (16, 12), 8, stride=4))
    weights = weighting(spec, 8, 8, 3, 2)
    torch.testing.assert_close(tiles.normalization, F.fold(weights, (16, 12), 8, stride=4))
    assert torch.equal(tiles.weights, weights.view(1, 1, 8, 8, 6))


def test_every_position_has_a_weight():
    tiles = FoldUnfold(TileSpec(8, 5), 16, 15)
    assert tiles.positions[-1] == (8, 7) and (tiles.normalization > 0).all()


def test_tiles_may_be_enlarged_or_reduced():
    x, spec = torch.randn(1, 2, 20, 14), TileSpec((8, 6), (4, 4))
    grown = tiled(lambda tile: F.interpolate(tile, scale_factor=2), spec, up=2)(x)
    torch.testing.assert_close(grown, F.interpolate(x, scale_factor=2))
    shrunk = tiled(lambda tile: F.avg_pool2d(tile, 2), spec, down=2)(x)
    torch.testing.assert_close(shrunk, F.avg_pool2d(x, 2))


def test_tiles_larger_than_the_map_are_the_map():
    x = torch.randn(1, 2, 6, 20)
    sizes = []
    tiled(lambda tile: sizes.append(tile.shape[-2:]) or tile, TileSpec(8, 8))(x)
    assert set(sizes) == {(6, 8)}


def test_further_maps_are_cut_alike():
    x, mask = torch.randn(2, 3, 12, 12), torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(tiled(lambda a, b: a * b, TileSpec(5, 3))(x, mask), x * mask)


def test_tiles_overlap_smoothly():
    x = torch.zeros(1, 1, 8, 14)
    index = iter([0.0, 1.0])
    y = tiled(lambda tile: tile + next(index), TileSpec(8, 6))(x)[0, 0, 4]
    assert (y.diff() >= -1e-6).all() and y[0] == 0 and y[-1] == 1


def test_gradients_and_precision_pass():
    x = torch.randn(1, 2, 10, 10, dtype=torch.float64, requires_grad=True)
    tiled(lambda tile: tile.square(), TileSpec(4, 3))(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-6, atol=1e-6)
    assert tiled(lambda tile: tile, TileSpec(4, 3))(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 4, "stride": 5}, "gaps"),
        ({"kernel": 0, "stride": 1}, r"TileSpec\.kernel"),
        ({"kernel": (4, 4, 4), "stride": 1}, r"TileSpec\.kernel"),
        ({"kernel": 4, "stride": 2, "clip_min": 0.0}, "positive"),
    ],
)
def test_bad_tiles_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        TileSpec(**arguments)


@pytest.mark.parametrize(("size", "spec"), [((16, 15), TileSpec(8, 4)), ((16, 16), TileSpec(8, 3))])
def test_reduced_sides_must_be_whole(size, spec):
    with pytest.raises(UserError, match="2 does not divide"):
        FoldUnfold(spec, *size, down=2)
