"""Low-rank adapters of linear layers and convolutions: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

    LoRA: W' = W + s B A, s = alpha / rank
    DoRA: W' = m (W + s B A) / |W + s B A|, norms over the weights of each output (no gradient passes through them)

A layer keeps its class and its names. Beside them it gets `lora_A`, `lora_B` and `lora_magnitude_vector`, the names of
peft, and `lora_alpha`; a hook adds to its output what they make of its input. B begins at 0 and m at |W|, so that
nothing is changed at first. In a state dict, adapters are the entries of these names; `folded` puts them into weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.bounds import Positive, Size
from ldm.errors import UserError, some
from ldm.weights.patterns import matched

State = dict[str, Tensor]
MAGNITUDE = ".lora_magnitude_vector"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ENTRY = re.compile(r"(.+)\.(?:(lora_[AB])\.weight|(lora_magnitude_vector)(?:\.weight)?|(?:lora_)?(alpha))")
_SPELLINGS = {r"\.(lora\.down|lora_down)\.": ".lora_A.", r"\.(lora\.up|lora_up)\.": ".lora_B."}


def is_of_adapter(name: str) -> bool:
    """Return whether a name in a state dict is that of an adapter's entry."""
    return ".lora_" in name


# -------------------------------------------------------------------------------------------------------- training one


@dataclass(frozen=True)
class LoRA:
    """Add a product of two thin matrices to the weights of layers.

    Args:
        modules: Patterns of the layers' names, which are those of their weights without `.weight`.
        rank: Width of the thin matrices.
        alpha: The product is multiplied by alpha / rank (default: by 1).
    """

    modules: Sequence[str]
    rank: Size = 8
    alpha: Positive | None = None
    has_magnitude: ClassVar[bool] = False

    def attach(self, model: nn.Module) -> list[str]:
        """Extend the layers that are chosen, of those whose weight is trained; return their names.

        UserError for a pattern that matches none, and for a layer that cannot be extended.
        """
        layers = {name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, *_CONVOLUTIONS))}
        trained = {name: layer for name, layer in layers.items() if layer.weight.requires_grad}
        chosen = list(matched(self.modules, trained, "adapter.modules", "linear layer or convolution that is trained"))
        for name in chosen:
            self._check(name, layers[name])
        for name in chosen:
            self._extend(layers[name])
        return chosen

    def _check(self, name: str, layer: nn.Module) -> None:
        if hasattr(layer, "lora_A"):
            raise UserError(f"adapter.modules: {name} has an adapter already; train one at a time")
        if getattr(layer, "groups", 1) != 1:
            raise UserError(f"adapter.modules: {name} is a convolution in groups, which cannot have one; leave it out")
        widest = min(len(layer.weight), layer.weight[0].numel())
        if self.rank > widest:
            raise UserError(f"adapter.rank: {self.rank} is more than {widest}, that of {name}; choose less")

    def _extend(self, layer: nn.Module) -> None:
        weight, where = layer.weight, {"device": layer.weight.device, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Linear):
            down = nn.Linear(layer.in_features, self.rank, bias=False, **where)
            up = nn.Linear(self.rank, layer.out_features, bias=False, **where)
        else:
            kind = _CONVOLUTIONS[weight.ndim - 3]
            same = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
            down = kind(layer.in_channels, self.rank, layer.kernel_size, bias=False, **same, **where)
            up = kind(self.rank, layer.out_channels, 1, bias=False, **where)
        nn.init.zeros_(up.weight)
        layer.lora_A, layer.lora_B = down, up
        alpha = self.rank if self.alpha is None else self.alpha
        layer.register_buffer("lora_alpha", torch.tensor(float(alpha), device=weight.device))
        if self.has_magnitude:
            layer.lora_magnitude_vector = nn.Parameter(_norms(weight.detach()))
        layer.register_forward_hook(_add_magnified if self.has_magnitude else _add)


class DoRA(LoRA):
    """The same, with the norms of the weights of each output learned apart from their directions."""

    has_magnitude: ClassVar[bool] = True


def _added(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.lora_B(layer.lora_A(x)) * (layer.lora_alpha / len(layer.lora_A.weight))


def _add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + _added(layer, inputs[0])


def _add_magnified(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        product = _product(layer.lora_A.weight, layer.lora_B.weight, layer.weight)
        turned = layer.weight + product * (layer.lora_alpha / len(layer.lora_A.weight))
    shape = (-1, *[1] * (layer.weight.ndim - 2))  # the axis of channels is the last one, or followed by places
    gain = _gain(layer.lora_magnitude_vector, turned).view(shape)
    unbiased = output if layer.bias is None else output - layer.bias.view(shape)
    return output + ((gain - 1) * unbiased + gain * _added(layer, inputs[0])).to(output.dtype)


def _norms(weight: Tensor) -> Tensor:
    """Return the norm of the weights of each output (out,), in one order of summing whatever the memory format."""
    return weight.flatten(1).norm(dim=1)


def _gain(magnitude: Tensor, turned: Tensor) -> Tensor:
    """Return m / |W + s B A|, 0 where there are no weights."""
    norms = _norms(turned)
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _product(down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Return B A in the shape of the layer's weight."""
    return (up.flatten(1) @ down.flatten(1)).view(weight.shape)


# --------------------------------------------------------------------------------------------------- as sets of tensors


@dataclass(frozen=True)
class Factors:
    """What an adapter holds for one layer: A (r, in, ...), B (out, r, ...), alpha, and DoRA's m (out,) or None."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def scale(self) -> float:
        """Return the factor of the product."""
        return self.alpha / len(self.down)

    def fits(self, weight: Tensor) -> bool:
        """Return whether this is for a layer with such a weight."""
        rows = self.magnitude is None or self.magnitude.numel() == len(weight)
        return rows and len(self.up) == len(weight) and self.down[0].numel() == weight[0].numel()

    def change(self, weight: Tensor) -> Tensor:
        """Return W' - W, in float32 at least."""
        weight, up, down = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in
                            (weight, self.up, self.down))  # fmt: skip
        product = self.scale * _product(down.to(weight.device), up.to(weight.device), weight)
        if self.magnitude is None:
            return product
        turned = weight + product
        gain = _gain(self.magnitude.flatten().to(weight), turned)
        return gain.view(-1, *[1] * (weight.ndim - 1)) * turned - weight


@dataclass(frozen=True)
class Adapter:
    """An adapter as a set of factors by the names of their layers.

    Args:
        layers: Factors by name of the layer.
        source: Where it comes from, for messages.
        identity: The same for the same adapter, under whatever names it was written; None: of these factors.
    """

    layers: Mapping[str, Factors]
    source: str
    identity: str | None = None

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], source: str, texts: Mapping[str, str] | None = None, strict: bool = False
    ) -> Adapter:
        """Collect the entries of an adapter in a state dict; texts: metadata of its file.

        UserError for factors that are incomplete or do not fit each other and, if strict, for other entries.
        """
        found: dict[str, dict[str, Tensor]] = {}
        others = []
        for name, tensor in state.items():
            for old, new in _SPELLINGS.items():
                name = re.sub(old, new, name)
            if entry := _ENTRY.fullmatch(name):
                found.setdefault(entry[1], {})[entry[2] or entry[3] or entry[4]] = tensor
            else:
                others.append(name)
        if strict and (others or not found):
            held = f"; it holds {some(others, 2, width=80)}" if others else ""
            raise UserError(f"{source}: is no LoRA or DoRA{held}")
        alphas = _Alphas.of(texts or {})
        whole = {name: parts for name, parts in found.items() if parts.keys() != {"alpha"}}
        layers = {name: _factors(name, parts, alphas, source) for name, parts in whole.items()}
        return cls(layers, source, (texts or {}).get("adapter"))

    def digest(self) -> str:
        """Return what tells this adapter from others."""
        if self.identity is not None:
            return self.identity
        whole = hashlib.sha256()
        for name, factors in sorted(self.layers.items()):
            parts = (factors.down, factors.up * factors.scale, factors.magnitude)
            for tensor in (part for part in parts if part is not None):
                whole.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()

    def entries(self) -> State:
        """Return tensors under peft's names, the factor of the product within B, so that alpha is the rank."""
        state = {}
        for name, factors in self.layers.items():
            state |= {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.up * factors.scale}
            if factors.magnitude is not None:
                state[f"{name}.lora_magnitude_vector"] = factors.magnitude
        return state

    def applied(self, state: Mapping[str, Tensor], share: float = 1.0) -> State:
        """Return a state dict in which `share` of the change is added to weights. UserError names what does not fit."""
        changed = dict(state)
        for name, factors in self.layers.items():
            weight = state.get(f"{name}.weight")
            if weight is None or weight.ndim < 2 or not factors.fits(weight):
                found = "is no such layer" if weight is None else f"its weight is {list(weight.shape)}"
                size = f"{factors.down[0].numel()} inputs, {len(factors.up)} outputs"
                raise UserError(f"{self.source}: is an adapter of another base: {name} ({size}): here {found}")
            changed[f"{name}.weight"] = (weight + share * factors.change(weight)).to(weight.dtype)
        return changed


@dataclass(frozen=True)
class _Alphas:
    """The settings of peft that diffusers writes into the metadata of a file, by component: `unet.lora_alpha`, ..."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> _Alphas:
        try:
            content = json.loads(texts.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            content = {}
        return cls(content if isinstance(content, dict) else {})

    def of_layer(self, name: str, rank: int) -> Any:
        """Return alpha of a layer, the rank where nothing says it."""
        component, _, inner = name.partition(".")

        def setting(key: str, default: Any) -> Any:
            return self.settings.get(f"{component}.{key}", self.settings.get(key, default))

        patterns = setting("alpha_pattern", {})
        ends = [end for end in patterns if f".{inner}".endswith(f".{str(end).removeprefix('^')}")]
        alpha = patterns[ends[0]] if ends else setting("lora_alpha", rank)
        return alpha * math.sqrt(rank) if setting("use_rslora", False) else alpha


def _factors(name: str, parts: Mapping[str, Tensor], alphas: _Alphas, source: str) -> Factors:
    down, up = parts.get("lora_A"), parts.get("lora_B")
    is_pair = down is not None and up is not None and min(down.ndim, up.ndim) >= 2 and 0 not in (*down.shape, *up.shape)
    if not is_pair or up[0].numel() != len(down):
        raise UserError(f"{source}: lora_A and lora_B of {name} are not a pair; copy or export it again")
    if not all(bool(part.float().isfinite().all()) for part in parts.values()):  # not every type can be asked
        raise UserError(f"{source}: {name} holds numbers that are not finite")
    try:
        alpha = float(parts["alpha"] if "alpha" in parts else alphas.of_layer(name, len(down)))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{source}: alpha of {name} is no number") from error
    if not math.isfinite(alpha):
        raise UserError(f"{source}: alpha of {name} is {alpha}")
    return Factors(down, up, alpha, parts.get("lora_magnitude_vector"))


def folded(state: Mapping[str, Tensor], source: str) -> State:
    """Return a state dict with the adapters in it as part of its weights; one without adapters as it is."""
    if not any(map(is_of_adapter, state)):
        return dict(state)
    rest = {name: tensor for name, tensor in state.items() if not is_of_adapter(name)}
    return adapter_in(state, source).applied(rest) if rest else dict(state)  # an adapter by itself is no model


def adapter_in(state: Mapping[str, Tensor], source: str) -> Adapter:
    """Return the adapter among the weights of a run."""
    return Adapter.of({name: tensor for name, tensor in state.items() if is_of_adapter(name)}, source)


def started(own: Mapping[str, Tensor], offered: Mapping[str, Tensor]) -> State:
    """Return the magnitudes with which an adapter starts on weights that are about to be loaded, if they bring none."""
    names = [name for name in own if name.endswith(MAGNITUDE)]
    weights = {name: offered.get(name.removesuffix(MAGNITUDE) + ".weight") for name in names}
    return {name: _norms(weight) for name, weight in weights.items() if weight is not None and name not in offered}
