"""Exponential moving average of weights, as kept beside the raw ones by latent diffusion models.

After each optimiser step n (counted from 1): shadow <- d * shadow + (1 - d) * parameter, with d = min(decay,
(1 + n) / (10 + n)) while warming up, d = decay otherwise. The raw weights stay in the module; the average has its own
keys, which are the parameter names without their dots, as released checkpoints have them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.errors import UserError
from ldm.weights.post_hoc import Profile, gamma_of


class ExponentialMovingAverage(nn.Module):
    """Keep float32 averages of the trainable parameters of a module.

    Only parameters that require gradients at construction are averaged; buffers are not. `warmup` False stores
    `num_updates` = -1 and uses the full decay from the first update.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True, root: str = "") -> None:
        """Start from the present weights; `root` is left out of the names of averages that begin with it."""
        super().__init__()
        self._root = root
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"ema_decay: {decay} is not between 0 and 1")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if warmup else -1, dtype=torch.int32))
        self._warmup = warmup
        self._shadow_names: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter)

    def _add(self, name: str, parameter: Tensor) -> None:
        shadow_name = name.removeprefix(self._root).replace(".", "")
        if shadow_name in self._buffers:
            raise ValueError(f"two parameters become '{shadow_name}' without their dots; rename one of them")
        self._shadow_names[name] = shadow_name
        self.register_buffer(shadow_name, parameter.detach().float().clone())

    def shard_like(self, model: nn.Module) -> None:
        """Lay the averages out over the ranks as the parameters are, after the module was sharded (FSDP2)."""
        parameters = dict(model.named_parameters())
        for name, shadow in self._shadow_names.items():
            parameter, average = parameters[name], self._buffers[shadow]
            if isinstance(parameter, DTensor) and not isinstance(average, DTensor):
                average = average.to(parameter.device)
                self._buffers[shadow] = distribute_tensor(average, parameter.device_mesh, parameter.placements)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return (shadows, parameters) in the same order; of sharded ones this rank's parts, which share the layout."""
        parameters = dict(model.named_parameters())
        shadows = [_local(self._buffers[shadow]) for shadow in self._shadow_names.values()]
        return shadows, [_local(parameters[name].detach()) for name in self._shadow_names]

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor | None = None) -> None:
        """Count one optimiser step and move the averages towards the parameters, without waiting for the device.

        Nothing moves where `skipped`, bool (), says that the optimiser made no step.
        """
        made = 1 if skipped is None else (~skipped).int()
        share = self._share(made) * made
        shadows, parameters = self._pairs(model)
        for shadow, parameter in zip(shadows, parameters, strict=True):
            shadow.lerp_(parameter.to(shadow.dtype), share)  # one pass over both; `share` stays on the device

    def _share(self, made: Tensor | int) -> Tensor:
        """Count `made` updates, and return how far the averages move towards the parameters."""
        decay = self.decay
        if self._warmup:
            self.num_updates += made
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        return 1 - decay

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of the module by their averages."""
        for shadow, parameter in zip(*self._pairs(model), strict=True):
            parameter.copy_(shadow)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averages in place of the parameters; the raw values come back even after an error."""
        _, parameters = self._pairs(model)
        backup = [parameter.clone() for parameter in parameters]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, raw in zip(parameters, backup, strict=True):
                    parameter.copy_(raw)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # A checkpoint decides whether its average warms up (-1 means that it does not), the config how fast it decays.
        decay = self.decay.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.decay.copy_(decay)
        count = state_dict.get(f"{prefix}num_updates")
        if count is not None:
            self._warmup = int(count) >= 0


class PowerFunctionAverage(ExponentialMovingAverage):
    """Keep averages whose length is a share of the training so far, instead of a number of steps.

    d = (1 - 1/n)^(gamma + 1) at update n (Karras et al., arXiv 2312.02696, equation 127); sigma_rel: relative length,
    between 0 and 0.28 (else UserError), from which gamma follows. `decay` is not used.
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel, self._exponent = sigma_rel, gamma_of(sigma_rel) + 1
        super().__init__(model, decay=1.0)

    def _share(self, made: Tensor | int) -> Tensor:
        """Count `made` updates, and return 1 - d without the loss of digits that a d near 1 would bring."""
        self.num_updates += made
        updates = self.num_updates.float().clamp(min=1)
        return -torch.expm1(self._exponent * torch.log1p(-1 / updates))

    @property
    def profile(self) -> Profile:
        """Which average of which steps this is; waits for the device."""
        return Profile(int(self.num_updates), self.sigma_rel)

    def named_averages(self) -> dict[str, Tensor]:
        """Return the averages by the names of their parameters."""
        return {name: self._buffers[shadow] for name, shadow in self._shadow_names.items()}


def _local(tensor: Tensor) -> Tensor:
    """Return the part that this rank holds; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
