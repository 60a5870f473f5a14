"""Structural similarity of pictures (Wang et al. 2004, eq. 13), beside `ldm.toy.agreement.psnr`.

    SSIM = (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2))
with means m, variances s^2 and covariance s_xy in a Gaussian window of 11 x 11 pixels and sigma 1.5,
c1 = (0.01 L)^2, c2 = (0.03 L)^2, L the range of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

MIN_SSIM_SIDE = 11  # of the window
_SIGMA, _RANGE = 1.5, 2.0


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Return the structural similarity of pictures (B, C, H, W) in [-1, 1], 1 for equal ones: (B,).

    The mean over all windows inside the picture and over the channels. UserError for sides below 11 pixels.
    """
    if min(images.shape[-2:]) < MIN_SSIM_SIDE:
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise UserError(f"SSIM: pictures of {size}; it needs sides of {MIN_SSIM_SIDE} or more")
    x, y = images.double().clamp(-1, 1), targets.double()
    maps = torch.cat([x, y, x * x, y * y, x * y])  # (5B, C, H, W)
    m_x, m_y, xx, yy, xy = _smoothed(maps).chunk(5)
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    similarity = (2 * m_x * m_y + c1) * (2 * (xy - m_x * m_y) + c2)
    similarity /= (m_x**2 + m_y**2 + c1) * (xx - m_x**2 + yy - m_y**2 + c2)
    return similarity.mean((1, 2, 3)).float()


def _smoothed(maps: Tensor) -> Tensor:
    """Average in windows that lie wholly inside: (B, C, H - 10, W - 10)."""
    offsets = torch.arange(MIN_SSIM_SIDE, dtype=maps.dtype, device=maps.device) - MIN_SSIM_SIDE // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = (line / line.sum()).expand(maps.shape[1], 1, 1, MIN_SSIM_SIDE)
    maps = F.conv2d(maps, line, groups=maps.shape[1])
    return F.conv2d(maps, line.mT, groups=maps.shape[1])
