"""Short names of this room's metrics and extractors, for `ldm.evaluation.build`."""

_SETS, _IMAGES = "ldm.evaluation.distribution_metrics", "ldm.evaluation.image_metrics"
METRICS = {
    "frechet": f"{_SETS}.Frechet",
    "spatial_frechet": f"{_SETS}.SpatialFrechet",
    "kernel": f"{_SETS}.Kernel",
    "inception_score": f"{_SETS}.InceptionScore",
    "precision_recall": f"{_SETS}.PrecisionRecall",
    "psnr": f"{_IMAGES}.psnr_to_target",
    "ssim": f"{_IMAGES}.ssim_to_target",
    "lpips": f"{_IMAGES}.Lpips",
    "clip_score": "ldm.evaluation.condition_metrics.ClipScore",
}
EXTRACTORS = {name.lower(): f"ldm.evaluation.extractors.{name}" for name in ("Inception", "Dino", "Clip")}
