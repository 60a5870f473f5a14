"""The one place that feeds a Conditioning to a U-Net (figure 3 of the paper: the switch before the denoising U-Net)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioner, Conditioning, Slot
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


def check_fit(network: nn.Module, latent_channels: int, conditioner: nn.Module | None = None) -> None:
    """Compare what a network takes with latents of so many channels and with what a conditioner gives.

    The network says it by its attributes in_channels, out_channels, context_dim, num_classes (None: none), the
    conditioners by `slot` and `width`; what either leaves open is not compared. UserError, naming both, for a misfit.
    """
    parts = [] if conditioner is None else [part for part in conditioner.modules() if isinstance(part, Conditioner)]
    _check_channels(network, latent_channels, [part for part in parts if part.slot == "concat"])
    _check_slot(network, "context_dim", [part for part in parts if part.slot == "context"], "context")
    _check_slot(network, "num_classes", [part for part in parts if part.slot == "vector"], "vector")


def _check_channels(network: nn.Module, latent_channels: int, parts: Sequence[Conditioner]) -> None:
    name = type(network).__name__
    if getattr(network, "out_channels", latent_channels) != latent_channels:
        raise UserError(
            f"{name}: out_channels is {network.out_channels}, but the autoencoder's latents have {latent_channels} "
            f"channels; set out_channels: {latent_channels}"
        )
    if any(part.width is None for part in parts):
        return
    total = latent_channels + sum(part.width for part in parts)
    if getattr(network, "in_channels", total) != total:
        added = "".join(f", and {type(part).__name__} concatenates {part.width}" for part in parts)
        raise UserError(
            f"{name}: in_channels is {network.in_channels}, but the autoencoder's latents have {latent_channels} "
            f"channels{added or ', and no conditioner concatenates any'}; set in_channels: {total}"
        )


def _check_slot(network: nn.Module, attribute: str, parts: Sequence[Conditioner], slot: Slot) -> None:
    if not hasattr(network, attribute):
        return
    name, taken = type(network).__name__, getattr(network, attribute)
    if taken is not None and not parts:
        raise UserError(
            f"{name}: {attribute} is {taken}, but no conditioner fills slot {slot}; add one, or leave {attribute} out"
        )
    for part in parts:
        if part.width not in (None, taken):
            given = f"{type(part).__name__} fills slot {slot} with width {part.width}"
            raise UserError(f"{name}: {attribute} is {taken}, but {given}; set {attribute}: {part.width}, or its width")


def _of_size(concat: Tensor, x: Tensor) -> Tensor:
    size, wanted = tuple(concat.shape[2:]), tuple(x.shape[2:])
    if size not in {wanted, (1, 1)}:
        raise UserError(
            f"conditioning: the picture to concatenate is {size[0]} x {size[1]}, the latent {wanted[0]} x {wanted[1]}; "
            "rescale it (SpatialRescaler) or encode it (FirstStageConditioner)"
        )
    return concat.expand(-1, -1, *wanted)
