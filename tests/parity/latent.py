"""What the adapters of latent diffusion share: conditionings and batches in the reference's notation."""

import torch

from ldm.conditioning.base import Conditioning

from .case import Case


def conditioning_key(case: Case) -> str | None:
    """Give the slot that the reference derives from the config."""
    params = case.params
    if params.get("cond_stage_config") == "__is_unconditional__":
        return None
    default = "concat" if params.get("concat_mode", True) else "crossattn"
    return params.get("conditioning_key") or default


def conditioning(case: Case, spec) -> Conditioning | None:
    """Translate a tensor name, a list of them, or {c_concat: [...], c_crossattn: [...]}."""
    if spec is None:
        return None
    key = conditioning_key(case)
    if not isinstance(spec, dict):
        spec = {"c_concat" if key == "concat" else "c_crossattn": spec if isinstance(spec, list) else [spec]}
    concat, cross = ([case.inputs[name] for name in spec.get(slot, ())] for slot in ("c_concat", "c_crossattn"))
    return Conditioning(
        concat=torch.cat(concat, dim=1) if concat and key in ("concat", "hybrid") else None,
        context=torch.cat(cross, dim=1) if cross and key in ("crossattn", "hybrid") else None,
        vector=cross[0] if cross and key == "adm" else None,
    )


def images_first(value: torch.Tensor) -> torch.Tensor:
    """Turn (B, H, W, C) or (B, H, W) pictures of a reference batch into (B, C, H, W); leave the rest."""
    if not value.is_floating_point() or value.ndim not in (3, 4):
        return value
    value = value[..., None] if value.ndim == 3 else value
    return value.movedim(-1, 1).contiguous()
