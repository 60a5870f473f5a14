"""The generated scenes of the demo, with their captions, detector, small extractors, and a small shipped model."""

from pathlib import Path

# Text to image, 1.5M parameters in half precision, of configs/demo/txt2img_tiny.yaml; docs/results.md has its figures.
TEXT_TO_IMAGE = Path(__file__).parent / "weights" / "txt2img_tiny.safetensors"
