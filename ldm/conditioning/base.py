"""How a condition y reaches the backbone: the value object, the module that makes it, and several of them together.

Section 3.3 of the paper: tau_theta(y) enters by concatenation to z_t, as the context of cross-attention, or (ADM) as a
vector added to the time embedding. Conditions are dropped per sample in training, so that one network learns both
eps(z_t, t, y) and eps(z_t, t) for classifier-free guidance (Ho & Salimans).
Legend: B batch, C channels, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.aliases import Batch, Uniform
from ldm.bounds import Fraction
from ldm.errors import UserError
from ldm.transfer import sent

Slot = Literal["concat", "context", "vector"]
EMBEDDED = "embedded."  # begins the names of batch entries that hold what a frozen conditioner made before
SLOTS: tuple[Slot, ...] = ("concat", "context", "vector")


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Conditioning:
    """What the backbone receives besides z_t and t; a slot that is not used is None.

    concat (B, C, H, W), where H = W = 1 fits any size; context (B, L, D); vector (B,) labels or (B, D).
    """

    concat: Tensor | None = None
    context: Tensor | None = None
    vector: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Return the number of samples. ValueError if no slot is filled."""
        for tensor in self._filled().values():
            return tensor.shape[0]
        raise ValueError("a Conditioning without any slot has no batch size")

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Return some samples of the batch."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Return a copy on a device; `dtype` converts floating tensors, labels stay integers."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    @staticmethod
    def stack(parts: Iterable[Conditioning]) -> Conditioning:
        """Concatenate batches, e.g. [unconditional, conditional]. UserError unless all fill the same slots."""
        parts = list(parts)
        filled = {tuple(part._filled()) for part in parts}
        if len(filled) != 1:
            raise UserError(f"conditioning: cannot stack batches that fill different slots: {sorted(filled)}")
        columns = {name: [getattr(part, name) for part in parts] for name in filled.pop()}
        if "concat" in columns:
            columns["concat"] = _same_size(columns["concat"])
        return Conditioning(**{name: torch.cat(column) for name, column in columns.items()})

    def join(self, other: Conditioning, context_axis: int = 1) -> Conditioning:
        """Return both conditions of the same samples: images and vectors by channels, contexts by tokens or channels.

        UserError if both fill `vector`, one of them with labels, and for contexts that do not go together.
        """
        if self.vector is not None and other.vector is not None and {self.vector.dim(), other.vector.dim()} != {2}:
            raise UserError("conditioning: two conditions fill slot vector, one with labels; give one of them context")
        joined = {}
        for name in SLOTS:
            both = [part for part in (getattr(self, name), getattr(other, name)) if part is not None]
            if name == "concat":
                both = _same_size(both)
            axis = context_axis if name == "context" else 1
            joined[name] = _joined(both, axis) if len(both) == 2 else next(iter(both), None)
        return Conditioning(**joined)

    def without(self, drop: Tensor | None = None) -> Conditioning:
        """Return zeros in the place of the samples where drop (B,) is True, or of all."""
        if drop is None:
            return self._map(torch.zeros_like)
        return self._map(lambda tensor: tensor * (~sent(drop, tensor.device)).view(-1, *[1] * (tensor.dim() - 1)))

    def _filled(self) -> dict[str, Tensor]:
        slots = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in slots.items() if tensor is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self._filled().items()})


def _same_size(images: list[Tensor]) -> list[Tensor]:
    """Expand images of 1 x 1 pixels to the size of the others."""
    sizes = {tuple(image.shape[2:]) for image in images} - {(1, 1)}
    if len(sizes) > 1:
        raise UserError(f"conditioning: images to concatenate differ in size: {sorted(sizes)}; rescale one of them")
    return [image.expand(-1, -1, *size) for image in images for size in (sizes or {(1, 1)})]


def _joined(both: list[Tensor], axis: int) -> Tensor:
    one, other = (list(tensor.shape) for tensor in both)
    if one[:axis] + one[axis + 1 :] != other[:axis] + other[axis + 1 :]:
        raise UserError(f"conditioning: {one} and {other} cannot be joined; their other sides must be equal")
    return torch.cat(both, dim=axis)


class InputSpec(NamedTuple):
    """What a conditioner expects of one batch entry: class ids, or images with `channels` channels.

    Class ids are below num_classes and never `reserved`. None leaves a value open.
    """

    num_classes: int | None = None
    reserved: int | None = None
    channels: int | None = None


class Conditioner(nn.Module):
    """Turn one entry of the batch into a Conditioning.

    A subclass writes `embed(value)` and `null(n)`, and sets `width`, which the backbone must have: channels in slot
    concat, D in slot context, number of labels in slot vector; None leaves it open. A subclass with weights calls
    `_freeze_unless_trainable()` at the end of its constructor.

    Args:
        key: name of the batch entry.
        slot: where the result goes.
        drop_rate: probability with which `draw_drop` drops a sample.
        trainable: False freezes the weights, keeps eval mode and embeds without gradient.
    """

    width: int | None = None
    cached_name: str | None = None
    is_kept = False  # in guidance: what is guided away from has it, too

    def __init__(self, key: str, slot: Slot, drop_rate: float = 0.0, trainable: bool = True) -> None:
        super().__init__()
        if slot not in SLOTS:
            raise UserError(f"{type(self).__name__}: slot '{slot}' is unknown; use one of {', '.join(SLOTS)}")
        if not 0.0 <= drop_rate <= 1.0:
            raise UserError(f"{type(self).__name__}: drop_rate is {drop_rate}; use a probability from 0 to 1")
        self.key = key
        self.slot: Slot = slot
        self.drop_rate = drop_rate
        self.trainable = trainable
        # Moves with the module, so that a conditioner without weights knows its device too.
        self.register_buffer("_device_buffer", torch.empty(0), persistent=False)

    def embed(self, value: Any) -> Tensor:
        """Return the tensor of the slot for a batch entry."""
        raise NotImplementedError

    def null(self, n: int) -> Tensor:
        """Return the embedding of 'no condition' for n samples, of the shape of `embed` (images: of 1 x 1 pixels)."""
        raise NotImplementedError

    def check_null(self) -> None:  # noqa: B027 - only those that may lack it write it
        """Raise UserError if nothing stands for 'no condition'; embeds nothing."""

    def embed_dropped(self, value: Any, drop: Tensor) -> Tensor:
        """Return `embed(value)` with `null` for the samples where drop (B,) is True.

        A conditioner with an expensive `embed` replaces the values instead, so that it runs once.
        """
        return _masked(self.embed(value), self.null(len(drop)), drop)

    def forward(self, batch: Batch, drop: Tensor | None = None) -> Conditioning:
        """Return the condition of a batch, `null` for the samples where drop (B,) is True.

        UserError if the batch has no entry `key`.
        """
        if self.cached_name in batch:
            embedding = sent(batch[self.cached_name], self.device)
            if drop is not None:
                embedding = _masked(embedding, self.cached_null, drop)
            return Conditioning(**{self.slot: embedding})
        value = self.value(batch)
        with nullcontext() if self.trainable else torch.no_grad():
            embedding = self.embed(value) if drop is None else self.embed_dropped(value, drop)
        return self.fill(embedding)

    def fill(self, embedding: Tensor) -> Conditioning:
        """Return an embedding in its slot."""
        return Conditioning(**{self.slot: embedding})

    def use_cached(self, name: str, null: Tensor) -> None:
        """Take embeddings from `embedded.NAME` of those batches that have it, and `null` (...) for dropped samples."""
        self.cached_name = EMBEDDED + name
        self.register_buffer("cached_null", null, persistent=False)

    def widths(self) -> dict[Slot, int | None]:
        """Return what the backbone must have for each slot that is filled."""
        return {self.slot: self.width}

    def entry_for(self, size: tuple[int, int]) -> Any:
        """Return the entry of an image of (height, width) that one need not be asked for, None if there is none."""
        return None

    def value(self, batch: Batch) -> Any:
        """Return this conditioner's entry of the batch."""
        return self._entry(batch, self.key)

    def input_specs(self) -> dict[str, InputSpec]:
        """Return what each batch entry must be, by key."""
        return {}

    def draw_drop(self, n: int, uniform: Uniform = torch.rand) -> Tensor:
        """Return for each of n samples whether its condition is dropped: bool (n,), on the CPU."""
        return uniform((n,)) < self.drop_rate

    def unconditional(self, n: int, batch: Batch | None = None) -> Conditioning:
        """Return n samples without condition; a condition that is kept in guidance is that of the batch, if given."""
        if self.is_kept and batch is not None:
            return self(batch)
        with nullcontext() if self.trainable else torch.no_grad():
            return self.fill(self.null(n))

    def use_first_stage(self, autoencoder: nn.Module) -> None:  # noqa: B027 - only those that need it write it
        """Receive the autoencoder of the model, which most conditioners do not need."""

    def train(self, mode: bool = True) -> Conditioner:
        """Set the mode, except that a conditioner that is not trainable stays in eval mode."""
        return super().train(mode and self.trainable)

    @property
    def device(self) -> torch.device:
        """Return the device of this module."""
        return self._device_buffer.device

    def _freeze_unless_trainable(self) -> None:
        """Freeze all weights made so far unless they are to be trained."""
        if not self.trainable:
            self.requires_grad_(False)
            self.eval()

    def _entry(self, batch: Batch, key: str) -> Any:
        if key not in batch:
            names = ", ".join(sorted(map(str, batch))) or "nothing"
            raise UserError(f"{type(self).__name__}: the batch has no '{key}', it has {names}; set key or the data set")
        return batch[key]


def _masked(embedding: Tensor, null: Tensor, drop: Tensor) -> Tensor:
    """Return the embedding (B, ...), `null` for the samples where drop (B,) is True."""
    mask = sent(drop, embedding.device).view(-1, *[1] * (embedding.dim() - 1))
    return torch.where(mask, null.to(embedding), embedding)


class JointConditioner(nn.Module):
    """Several conditioners, each a child under the name of its keyword.

    drop_rate: probability of dropping all conditions of a sample together, in addition to the drop_rate of each.
    """

    context_axis = 1

    def __init__(self, drop_rate: Fraction = 0.0, **conditioners: Conditioner) -> None:
        super().__init__()
        if not conditioners:
            raise UserError("JointConditioner: needs at least one conditioner, under any name")
        if not 0.0 <= drop_rate <= 1.0:
            raise UserError(f"JointConditioner: drop_rate is {drop_rate}; use a probability from 0 to 1")
        self.drop_rate = drop_rate
        for name, conditioner in conditioners.items():
            self.add_module(name, conditioner)

    @property
    def trainable(self) -> bool:
        """Return whether any of the conditioners is trainable."""
        return any(child.trainable for child in self.children())

    def forward(self, batch: Batch, drop: Tensor | None = None) -> Conditioning:
        """Return all K conditions of a batch. drop: bool (B,) for all of them, or (B, K)."""
        children = list(self.children())
        if drop is None:
            return self._joined(child(batch) for child in children)
        columns = drop.view(len(drop), -1).expand(-1, len(children)).unbind(dim=1)
        return self._joined(child(batch, column) for child, column in zip(children, columns, strict=True))

    def draw_drop(self, n: int, uniform: Uniform = torch.rand) -> Tensor:
        """Return which of the K conditions of n samples are dropped: bool (n, K)."""
        together = uniform((n, 1)) < self.drop_rate
        own = torch.stack([child.draw_drop(n, uniform) for child in self.children()], dim=1)
        return own | together

    def unconditional(self, n: int, batch: Batch | None = None) -> Conditioning:
        """Return n samples without any condition but those that are kept in guidance."""
        return self._joined(child.unconditional(n, batch) for child in self.children())

    def use_first_stage(self, autoencoder: nn.Module) -> None:
        """Pass the autoencoder of the model to every conditioner."""
        for child in self.children():
            child.use_first_stage(autoencoder)

    def _joined(self, parts: Iterable[Conditioning]) -> Conditioning:
        result = Conditioning()
        for part in parts:
            result = result.join(part, self.context_axis)
        return result


class StackedConditioner(JointConditioner):
    """Several conditioners, whose contexts and vectors are joined by their channels (SDXL, arXiv 2307.01952).

    null: 'no condition' is zeros, or the own one of each conditioner.
    """

    context_axis = 2

    def __init__(
        self, drop_rate: Fraction = 0.0, null: Literal["zeros", "own"] = "zeros", **conditioners: Conditioner
    ) -> None:
        super().__init__(drop_rate, **conditioners)
        self.null = null

    def forward(self, batch: Batch, drop: Tensor | None = None) -> Conditioning:
        """Return all K conditions of a batch. drop: bool (B,) for all of them, or (B, K)."""
        if drop is None or self.null == "own":
            return super().forward(batch, drop)
        children = list(self.children())
        columns = drop.view(len(drop), -1).expand(-1, len(children)).unbind(dim=1)
        return self._joined(child(batch).without(column) for child, column in zip(children, columns, strict=True))

    def unconditional(self, n: int, batch: Batch | None = None) -> Conditioning:
        """Return n samples without any condition but those that are kept in guidance."""
        if self.null == "own":
            return super().unconditional(n, batch)
        return self._joined(
            part if child.is_kept and batch is not None else part.without()
            for child in self.children()
            for part in [child.unconditional(n, batch) if batch is None else child(batch)]
        )
