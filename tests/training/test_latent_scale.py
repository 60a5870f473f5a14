import pytest
import torch

from ldm.errors import UserError
from ldm.models.latent_scale import LatentScale, unit_variance_scale


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
