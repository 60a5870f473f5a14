"""From a Conditioning to the inputs of a backbone (figure 3 of the paper: the switch before the denoising U-Net)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.conditioning.base import Conditioner, Conditioning, Slot, StackedConditioner
from ldm.errors import UserError
from ldm.networks.backbone import Backbone, as_backbone


class ConditionalNetwork(nn.Module):
    """A backbone that is called with a Conditioning; it keeps its published name, `diffusion_model`."""

    def __init__(self, diffusion_model: Backbone) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning | None = None, hidden: list[Tensor] | None = None
    ) -> Tensor:
        """Return the prediction (B, out_channels, H, W) for x (B, C, H, W) at times t (B,).

        hidden: of a backbone that `ShowsHidden`, gets the state behind each of its blocks. UserError if the image to
        concatenate is neither of the size of x nor 1 x 1.
        """
        shown = {} if hidden is None else {"hidden": hidden}
        if conditioning is None:
            return self.diffusion_model(x, t, **shown)
        if conditioning.concat is not None:
            x = torch.cat([x, _of_size(conditioning.concat, x).to(x.dtype)], dim=1)  # (B, C + C', H, W)
        return self.diffusion_model(x, t, context=conditioning.context, y=conditioning.vector, **shown)

    def wrapped(self, wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> ConditionalNetwork:
        """Return the same over what `wrap` makes of the backbone, a callable like it; it owns no weights then."""
        return ConditionalNetwork(wrap(self.diffusion_model))

    def with_weights(self, weights: Mapping[str, Tensor]) -> ConditionalNetwork:
        """Return the same with other weights in the place of those of their names; no weight is copied."""
        own = {name.removeprefix("diffusion_model."): value for name, value in weights.items()}
        return self.wrapped(lambda backbone: _Reweighted(backbone, own))


class _Reweighted(nn.Module):
    """A backbone that is called with other weights in the place of some of its own."""

    def __init__(self, backbone: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backbone, self.weights = backbone, dict(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return functional_call(self.backbone, self.weights, args, kwargs)


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
    has_vectors = getattr(backbone, "vector_dim", None) is not None
    is_stacked = isinstance(conditioner, StackedConditioner)
    _check_slot(backbone, "context_dim", parts, "context", is_stacked)
    _check_slot(backbone, "vector_dim" if has_vectors else "num_classes", parts, "vector", has_vectors)


def _check_channels(backbone: Backbone, latent_channels: int, parts: Sequence[Conditioner]) -> None:
    name = type(backbone).__name__
    if backbone.out_channels not in (latent_channels, 2 * latent_channels):  # twice where the variance is learned
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


def _check_slot(backbone: Backbone, attribute: str, parts: Sequence[Conditioner], slot: Slot, summed: bool) -> None:
    """Compare the width of each part that fills a slot, or their sum, with that of the backbone."""
    name, wanted = type(backbone).__name__, getattr(backbone, attribute)
    given = [(part, part.widths()[slot]) for part in parts if slot in part.widths()]
    if wanted is not None and not given:
        raise UserError(
            f"{name}: {attribute} is {wanted}, but no conditioner fills slot {slot}; add one, or leave {attribute} out"
        )
    widths = [width for _, width in given]
    if summed and wanted is not None and None not in widths:
        if sum(widths) != wanted:
            fills = f"the conditioners fill slot {slot} with {' + '.join(map(str, widths))} channels"
            raise UserError(f"{name}: {attribute} is {wanted}, but {fills}; set {attribute}: {sum(widths)}")
        return
    for part, width in given:
        if width not in (None, wanted):
            fills = f"{type(part).__name__} fills slot {slot} with width {width}"
            raise UserError(f"{name}: {attribute} is {wanted}, but {fills}; set {attribute}: {width} or its width")


def _of_size(concat: Tensor, x: Tensor) -> Tensor:
    size, wanted = tuple(concat.shape[2:]), tuple(x.shape[2:])
    if size not in {wanted, (1, 1)}:
        raise UserError(
            f"conditioning: the image to concatenate is {size[0]} x {size[1]}, the latent {wanted[0]} x {wanted[1]}; "
            "rescale it (SpatialRescaler) or encode it (FirstStageConditioner)"
        )
    return concat.expand(-1, -1, *wanted)
