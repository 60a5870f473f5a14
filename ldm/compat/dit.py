"""Files of DiT, SiT, LightningDiT and REPA -> our names: they hold the network of a latent diffusion model alone.

Either its state dict as it is, or {"model": trained weights, "ema": their average, "opt": ..., "args": ...}, one of the
two or both, perhaps from a module that was wrapped for several devices (`module.`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NETWORK, AVERAGE = "model.diffusion_model.", "model_ema.diffusion_model"
_FIRST = "x_embedder.proj.weight"  # which all of them have
_OF_TRAINING = "projectors."  # REPA's alignment with a teacher


def renamed(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the tensors of one of these files under our names, trained and averaged; any other content as it is."""
    trained, averaged = _network(state.get("model")), _network(state.get("ema"))
    weights = trained or averaged or _network(state)
    found = {NETWORK + name: value for name, value in weights.items()}
    if trained:
        found |= {AVERAGE + name.replace(".", ""): value for name, value in averaged.items()}
    return found or state


def _network(entry: Any) -> dict[str, Any]:
    """Return the weights of a network by its own names; nothing if an entry of a file holds another thing."""
    if not isinstance(entry, dict):
        return {}
    named = {name.removeprefix("module."): value for name, value in entry.items() if isinstance(name, str)}
    is_theirs = _FIRST in named
    return {name: value for name, value in named.items() if is_theirs and not name.startswith(_OF_TRAINING)}
