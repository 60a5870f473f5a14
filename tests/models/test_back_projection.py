import torch

from ldm.evaluation.image_metrics import psnr
from ldm.models.back_projection import back_project
from ldm.toy.metrics import enlarged, sharpness, shrunk


def test_pictures_are_held_to_small_ones_and_keep_their_detail():
    generator = torch.Generator().manual_seed(0)
    smooth = enlarged(0.7 * torch.rand(4, 3, 8, 8, generator=generator) - 0.3, 4)
    truth = (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
    small = shrunk(truth, 4)
    drawn = (0.8 * truth + 0.1).clamp(-1, 1)  # right detail, wrong brightness and contrast
    held = back_project(drawn, small)
    assert psnr(shrunk(drawn, 4), small).max() < 30 < 45 < psnr(shrunk(held, 4), small).min()
    assert (psnr(held, truth) > psnr(drawn, truth) + 5).all()
    assert (psnr(held, truth) > psnr(enlarged(small, 4), truth) + 5).all()
    torch.testing.assert_close(sharpness(held), sharpness(truth), rtol=0.3, atol=0)


def test_what_fits_already_stays():
    image = torch.full((1, 3, 16, 16), 0.25)
    torch.testing.assert_close(back_project(image, torch.full((1, 3, 4, 4), 0.25)), image)
