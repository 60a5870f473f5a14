"""Adapter of patch-wise processing: tiles of the latent through the network and through the first stage."""

import torch

from ldm.conditioning.base import Conditioning
from ldm.networks.tiling import FoldUnfold, TileSpec, delta_border, tiled, weighting

from .case import Case
from .latent import conditioning

WEIGHTED_ROWS, WEIGHTED_COLUMNS = 3, 4  # the grid that the recorder asked weights for


@torch.no_grad()
def split(case: Case, tmp_path) -> dict:
    case.allow_args("split", "cond")
    model, x, options = case.model(), case.inputs["x"], case.args["split"]
    spec, factor = _spec(options), options["vqf"]
    results = {
        "delta_border": delta_border(*spec.kernel),
        "weighting": weighting(spec, *spec.kernel, WEIGHTED_ROWS, WEIGHTED_COLUMNS),
        "apply_model": _apply_model(case, model, spec),
    }
    for name, resize in (("plain", {}), ("up", {"up": factor}), ("down", {"down": factor})):
        tiles = FoldUnfold(spec, *x.shape[-2:], **resize)
        results[f"{name}_norm"] = tiles.normalization
        results[f"{name}_weight"] = tiles.weights
        results[f"{name}_unfold"] = tiles.unfold(x)
    if options.get("patch_distributed_vq"):
        results["decode"] = tiled(model.decode_latents, spec, up=factor)(x)
        results["diff_decode"] = tiled(lambda tile: model.decode_latents(tile, quantize=False), spec, up=factor)(x)
        if "img" in case.inputs:
            results["encode"] = tiled(model.first_stage_model.encode, spec, down=factor)(case.inputs["img"])
    return results


def _spec(options: dict) -> TileSpec:
    return TileSpec(
        kernel=options["ks"],
        stride=options["stride"],
        clip_min=options["clip_min_weight"],
        clip_max=options["clip_max_weight"],
        tie_breaker=options["tie_braker"],
        clip_min_tie=options["clip_min_tie_weight"],
        clip_max_tie=options["clip_max_tie_weight"],
    )


def _apply_model(case: Case, model, spec: TileSpec) -> torch.Tensor:
    """Cut a concatenated condition like the latent; give any other one to every tile."""
    cond, t = conditioning(case, case.args.get("cond")), case.inputs["t"]
    if cond is None or cond.concat is None:
        return tiled(lambda tile: model.model(tile, t, cond), spec)(case.inputs["x"])
    run = tiled(lambda tile, concat: model.model(tile, t, Conditioning(concat=concat)), spec)
    return run(case.inputs["x"], cond.concat)


ADAPTERS = {"split": split}
