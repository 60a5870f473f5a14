"""The one place that feeds a Conditioning to a U-Net (figure 3 of the paper: the switch before the denoising U-Net)."""

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioning
from ldm.errors import UserError


class ConditionalNetwork(nn.Module):
    """Wrap a network that takes (x, t, context=, y=); it keeps its published name, `diffusion_model`."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Run the network on x (B, C, H, W) and steps t (B,), with the condition in the slots that it fills.

        UserError if the picture to concatenate is neither of the size of x nor 1 x 1.
        """
        if conditioning is None:
            return self.diffusion_model(x, t)
        if conditioning.concat is not None:
            x = torch.cat([x, _of_size(conditioning.concat, x).to(x.dtype)], dim=1)  # (B, C + C', H, W)
        named = {"context": conditioning.context, "y": conditioning.vector}
        return self.diffusion_model(x, t, **{name: value for name, value in named.items() if value is not None})


def _of_size(concat: Tensor, x: Tensor) -> Tensor:
    size, wanted = tuple(concat.shape[2:]), tuple(x.shape[2:])
    if size not in {wanted, (1, 1)}:
        raise UserError(
            f"conditioning: the picture to concatenate is {size[0]} x {size[1]}, the latent {wanted[0]} x {wanted[1]}; "
            "rescale it (SpatialRescaler) or encode it (FirstStageConditioner)"
        )
    return concat.expand(-1, -1, *wanted)
