"""Metrics of samples, reconstructions and images, with everything that their values depend on."""

from ldm.evaluation.evaluate import Result, Samples, evaluate_images, evaluate_reconstructions, evaluate_samples
from ldm.evaluation.metric_suite import MetricSuite

__all__ = ["MetricSuite", "Result", "Samples", "evaluate_images", "evaluate_reconstructions", "evaluate_samples"]
