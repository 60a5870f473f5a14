import pytest
import tiny
import torch

from ldm.errors import UserError
from ldm.models.latent_scale import LatentScale, channel_moments, unit_variance_scale


def test_scale_is_one_over_the_standard_deviation_of_everything_together() -> None:
    latents = [torch.randn(3, 2, 4, 4) * 2 + 1, torch.randn(5, 2, 4, 4)]
    expected = 1 / torch.cat([z.flatten() for z in latents]).std()
    torch.testing.assert_close(unit_variance_scale(latents), expected)
    broken = torch.full((2, 2, 4, 4), float("nan"))
    torch.testing.assert_close(unit_variance_scale([*latents, broken]), expected)


def test_ranks_agree_when_sums_are_exchanged() -> None:
    first, second = torch.randn(4, 2, 2, 2) * 3, torch.randn(4, 2, 2, 2) + 5
    sums: list[torch.Tensor] = []
    unit_variance_scale([second], lambda moments: sums.append(moments) or moments)
    torch.testing.assert_close(
        unit_variance_scale([first], lambda moments: moments + sums[0]), unit_variance_scale([first, second])
    )


@pytest.mark.parametrize("value", [0.0, -1.0, "mesure"])
def test_what_is_no_scale_is_refused(value: float | str) -> None:
    with pytest.raises(UserError, match="latent_scale"):
        LatentScale(value)


def test_degenerate_latents_are_refused() -> None:
    with pytest.raises(UserError, match="variance"):
        unit_variance_scale([torch.ones(2, 2, 2, 2)])
    with pytest.raises(UserError, match="empty"):
        unit_variance_scale([])


def shifted_latents() -> torch.Tensor:
    """Latents whose channels have means 1 and -2 and deviations 0.5 and 3."""
    z = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return z * torch.tensor([0.5, 3.0])[:, None, None] + torch.tensor([1.0, -2.0])[:, None, None]


def test_moments_of_channels_whatever_batches_and_ranks_they_come_in() -> None:
    z = shifted_latents()
    mean, std = channel_moments([z])
    torch.testing.assert_close(mean.flatten(), z.mean((0, 2, 3)))
    torch.testing.assert_close(std.flatten(), z.transpose(0, 1).flatten(1).std(1))
    sums: list[torch.Tensor] = []
    channel_moments([z[40:]], lambda own: sums.append(own) or own)
    for one, other in zip(channel_moments([z[:10], z[10:40]], lambda own: own + sums[0]), (mean, std), strict=True):
        torch.testing.assert_close(one, other)
    broken = torch.full((2, 2, 4, 4), float("nan"))
    torch.testing.assert_close(channel_moments([z, broken])[0], mean)


def test_a_model_normalises_each_channel_and_back() -> None:
    given = LatentScale(0.5, mean=[1.0, -2.0], std=[0.5, 3.0])
    model = tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), latent_scale=given).model
    z = shifted_latents()
    scaled = model.scaled(z)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)
    torch.testing.assert_close(model.decode(scaled[:2]), model.first_stage_model.decode(z[:2]), atol=1e-4, rtol=1e-4)


def test_measured_moments_are_saved_beside_the_published_names() -> None:
    plain = tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), latent_scale="measure").model
    scale = LatentScale("measure", per_channel=True)
    model, other = (tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), latent_scale=scale).model for _ in range(2))
    assert set(model.state_dict()) - set(plain.state_dict()) == {"latent_mean", "latent_std"}
    assert not model.scale_is_known
    model.measure_scale([shifted_latents()])
    torch.testing.assert_close(model.latent_mean.flatten(), torch.tensor([1.0, -2.0]), atol=0.3, rtol=0)
    other.load_state_dict(model.state_dict())
    assert other.scale_is_known and torch.equal(other.scaled(shifted_latents()), model.scaled(shifted_latents()))
    torch.testing.assert_close(model.scaled(shifted_latents()).std((0, 2, 3)), torch.ones(2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mean": [0.0]}, "mean and std belong together"),
        ({"mean": [0.0], "std": [0.0]}, "above 0"),
        ({"mean": [0.0], "std": [1.0, 1.0]}, "a number for each channel"),
        ({"value": "measure", "mean": [0.0], "std": [1.0]}, "'measure'"),
        ({"per_channel": True}, "per_channel.*measure"),
    ],
)
def test_half_a_normalisation_is_refused(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"latent_scale: .*{named}"):
        LatentScale(**options)


def test_a_normalisation_of_other_channels_is_refused() -> None:
    with pytest.raises(UserError, match="3 channels, but the latents have 2"):
        given = LatentScale(mean=[0.0] * 3, std=[1.0] * 3)
        tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), latent_scale=given)
