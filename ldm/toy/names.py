"""Short names of the toy world's metrics and extractor, for `ldm.evaluation.build`."""

METRICS = {name: f"ldm.toy.metrics.{name}" for name in ("captions_drawn", "layout_iou", "map_iou")}
EXTRACTORS = {"scenenet": "ldm.toy.scene_extractor.SceneNet"}
