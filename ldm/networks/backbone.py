"""What a latent diffusion model asks of its network eps_theta(z_t, t, tau(y)) (section 3.3 of arXiv 2112.10752)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from ldm.errors import UserError


@runtime_checkable
class Backbone(Protocol):
    """A network (an nn.Module) that predicts from a noisy latent, its time and a condition.

    in_channels: of x, those of the latent and those that conditioners concatenate;
    out_channels: of the prediction;
    context_dim: channels of the tokens of cross-attention, None without cross-attention;
    num_classes: rows of its table of class labels, None without labels; one that takes vectors (B, D) in the place of
        labels has vector_dim, D, beside it;
    size_multiple: the sides of x must be multiples of it;
    blocks: the modules to shard or recompute one by one, in their order of use; none contains another.
    """

    in_channels: int
    out_channels: int
    context_dim: int | None
    num_classes: int | None
    size_multiple: int
    blocks: Sequence[nn.Module]

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return the prediction (B, out_channels, H, W) in the dtype of x.

        x (B, in_channels, H, W); t (B,) times, integer or fractional; context (B, L, context_dim); y (B,) class ids.
        """


class HiddenShape(NamedTuple):
    """Channels of a hidden state, and by which factor its sides are smaller than those of x."""

    channels: int
    factor: int


@runtime_checkable
class ShowsHidden(Protocol):
    """What a backbone has beyond `Backbone` if the states between its blocks can be seen, e.g. to be aligned.

    Its call also takes `hidden`, a list to which it appends the state behind each block, (B, C, h, w).

    hidden_shapes: of the state behind each of `blocks`.
    """

    hidden_shapes: Sequence[HiddenShape]


def as_backbone(network: nn.Module) -> Backbone:
    """Return `network`. UserError, which names what it lacks, unless it is a Backbone."""
    if isinstance(network, Backbone):
        return network
    lacking = ", ".join(name for name in Backbone.__annotations__ if not hasattr(network, name))
    raise UserError(f"{type(network).__name__}: is no backbone, it lacks {lacking}; see ldm.networks.backbone.Backbone")
