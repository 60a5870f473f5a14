"""From a Conditioning to the inputs of a backbone (figure 3 of the paper: the switch before the denoising U-Net)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioner, Conditioning, Slot
from ldm.errors import UserError
from ldm.networks.backbone import Backbone, as_backbone


class ConditionalNetwork(nn.Module):
    """A backbone that is called with a Conditioning; it keeps its published name, `diffusion_model`."""

    def __init__(self, diffusion_model: Backbone) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Return the prediction (B, out_channels, H, W) for x (B, C, H, W) at times t (B,).

        UserError if the image to concatenate is neither of the size of x nor 1 x 1.
        """
        if conditioning is None:
            return self.diffusion_model(x, t)
        if conditioning.concat is not None:
            x = torch.cat([x, _of_size(conditioning.concat, x).to(x.dtype)], dim=1)  # (B, C + C', H, W)
        return self.diffusion_model(x, t, context=conditioning.context, y=conditioning.vector)


def check_fit(network: nn.Module, latent_channels: int, conditioner: nn.Module | None = None) -> None:
    """Check that a backbone takes the latents and all that the conditioners give, and nothing else.

    A conditioner without `width` is not compared. UserError, naming both sides, for a misfit and for a network that
    is no Backbone; nn.Identity is accepted as the placeholder of a model that is used without a network.
    """
    if isinstance(network, nn.Identity):
        return
    backbone = as_backbone(network)
    parts = [] if conditioner is None else [part for part in conditioner.modules() if isinstance(part, Conditioner)]
    _check_channels(backbone, latent_channels, [part for part in parts if part.slot == "concat"])
    _check_slot(backbone, "context_dim", [part for part in parts if part.slot == "context"], "context")
    _check_slot(backbone, "num_classes", [part for part in parts if part.slot == "vector"], "vector")


def _check_channels(backbone: Backbone, latent_channels: int, parts: Sequence[Conditioner]) -> None:
    name = type(backbone).__name__
    if backbone.out_channels != latent_channels:
        raise UserError(
            f"{name}: out_channels is {backbone.out_channels}, but the autoencoder's latents have {latent_channels} "
            f"channels; set out_channels: {latent_channels}"
        )
    if any(part.width is None for part in parts):
        return
    total = latent_channels + sum(part.width for part in parts)
    if backbone.in_channels != total:
        added = "".join(f", and {type(part).__name__} concatenates {part.width}" for part in parts)
        raise UserError(
            f"{name}: in_channels is {backbone.in_channels}, but the autoencoder's latents have {latent_channels} "
            f"channels{added or ', and no conditioner concatenates any'}; set in_channels: {total}"
        )


def _check_slot(backbone: Backbone, attribute: str, parts: Sequence[Conditioner], slot: Slot) -> None:
    name, wanted = type(backbone).__name__, getattr(backbone, attribute)
    if wanted is not None and not parts:
        raise UserError(
            f"{name}: {attribute} is {wanted}, but no conditioner fills slot {slot}; add one, or leave {attribute} out"
        )
    for part in parts:
        if part.width not in (None, wanted):
            fills = f"{type(part).__name__} fills slot {slot} with width {part.width}"
            raise UserError(f"{name}: {attribute} is {wanted}, but {fills}; set {attribute}: {part.width} or its width")


def _of_size(concat: Tensor, x: Tensor) -> Tensor:
    size, wanted = tuple(concat.shape[2:]), tuple(x.shape[2:])
    if size not in {wanted, (1, 1)}:
        raise UserError(
            f"conditioning: the image to concatenate is {size[0]} x {size[1]}, the latent {wanted[0]} x {wanted[1]}; "
            "rescale it (SpatialRescaler) or encode it (FirstStageConditioner)"
        )
    return concat.expand(-1, -1, *wanted)
