"""Short names of this room's metrics and extractors, for `ldm.evaluation.build`, and what values are usually called."""

from typing import NamedTuple

_SETS, _IMAGES = "ldm.evaluation.distribution_metrics", "ldm.evaluation.image_metrics"
METRICS = {
    "frechet": f"{_SETS}.Frechet",
    "spatial_frechet": f"{_SETS}.SpatialFrechet",
    "memorisation_frechet": f"{_SETS}.MemorisationFrechet",
    "kernel": f"{_SETS}.Kernel",
    "mmd": f"{_SETS}.Mmd",
    "inception_score": f"{_SETS}.InceptionScore",
    "precision_recall": f"{_SETS}.PrecisionRecall",
    "psnr": f"{_IMAGES}.psnr_to_target",
    "ssim": f"{_IMAGES}.ssim_to_target",
    "lpips": f"{_IMAGES}.Lpips",
    "clip_score": "ldm.evaluation.condition_metrics.ClipScore",
}
EXTRACTORS = {name.lower(): f"ldm.evaluation.extractors.{name}" for name in ("Inception", "Dino", "Clip")}
EXTRACTORS["shape_colour"] = "ldm.evaluation.shape_colour.ShapeColour"


class UsualName(NamedTuple):
    """What a metric of samples and of reconstructions is called where it is measured by `extractor`."""

    of_samples: str
    of_reconstructions: str
    extractor: str


USUAL_NAMES = {
    "frechet": UsualName("FID", "rFID", "inception"),
    "spatial_frechet": UsualName("sFID", "r-sFID", "inception"),
    "memorisation_frechet": UsualName("MIFID", "r-MIFID", "inception"),
    "kernel": UsualName("KID", "rKID", "inception"),
    "mmd": UsualName("CMMD", "r-CMMD", "clip"),
    "inception_score": UsualName("IS", "R-IS", "inception"),
}
