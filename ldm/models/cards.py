"""What a reader finds beside exported weights: README.md in a folder, `modelspec.*` texts in a safetensors file.

The model card says what the model is, on which data it was measured and with which figures, and how it is loaded. The
texts are those of the specification by Stability AI, which ComfyUI, the web UI and others show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Config = Mapping[str, Any]
_TASKS = {
    "LDMPipeline": "unconditional-image-generation",
    "LDMSuperResolutionPipeline": "image-to-image",
    "StableDiffusionInpaintPipeline": "image-to-image",
}  # all others draw what a text says
_PREDICTIONS = {"Epsilon": "epsilon", "Velocity": "v", "Sample": "sample"}
_LDM, _STABLE = "https://github.com/CompVis/latent-diffusion", "https://github.com/CompVis/stable-diffusion"
# Stable Diffusion by the widths of the contexts and the vectors of its U-Net: architecture, implementation.
_ARCHITECTURES = {
    (768, None): ("stable-diffusion-v1", _STABLE),
    (1024, None): ("stable-diffusion-v2", "https://github.com/Stability-AI/stablediffusion"),
    (2048, 2816): ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
}
_MODEL_CHANNELS = 320  # of its U-Net
_MAPPINGS = ("labels", "values", "intervals")  # of an evaluation


def modelspec(section: Config, title: str) -> dict[str, str]:
    """Return the texts for section `model` of a config; of a model that is none of Stability's, `latent-diffusion`."""
    params = section.get("params") or {}
    texts = {"sai_model_spec": "1.0.0", "title": title}
    if "network" not in params:
        return _prefixed({**texts, "architecture": "latent-diffusion/autoencoder", "implementation": _LDM})
    network = (params["network"] or {}).get("params") or {}
    widths = (network.get("context_dim"), network.get("vector_dim"))
    is_stable = network.get("model_channels") == _MODEL_CHANNELS and widths in _ARCHITECTURES
    architecture, implementation = _ARCHITECTURES[widths] if is_stable else ("latent-diffusion", _LDM)
    prediction = str((params.get("prediction") or {}).get("target", "Epsilon")).rpartition(".")[2]
    size = params.get("latent_size")
    if is_stable:
        has_mask = network.get("in_channels") == 2 * network.get("out_channels", 0) + 1
        side = f"-{8 * size}" if architecture.endswith("v2") and isinstance(size, int) else ""
        velocity = "-v" if architecture.endswith("v2") and prediction == "Velocity" else ""
        architecture += ("-inpainting" if has_mask else "") + side + velocity
        if isinstance(size, int):
            texts["resolution"] = f"{8 * size}x{8 * size}"
    texts |= {"architecture": architecture, "implementation": implementation}
    return _prefixed(texts | {"prediction_type": _PREDICTIONS.get(prediction, prediction)})


def _prefixed(texts: Mapping[str, str]) -> dict[str, str]:
    return {f"modelspec.{name}": text for name, text in texts.items()}


def card(title: str, kind: str, section: Config, evaluations: Mapping[str, Config]) -> str:
    """Return a model card as Markdown, with the front matter of the Hugging Face hub.

    kind: class of diffusers that reads the folder; evaluations: contents of evaluation.json files by their paths.
    """
    is_pipeline = kind.endswith("Pipeline")
    front: dict[str, Any] = {"library_name": "diffusers", "tags": ["latent-diffusion"]}
    if is_pipeline:
        front["pipeline_tag"] = _TASKS.get(kind, "text-to-image")
    load = ["```python", f"from diffusers import {kind}", f'model = {kind}.from_pretrained("FOLDER")']
    if is_pipeline:
        load += ["", "# or, with the code that trained it", "from ldm.models.latent_diffusion import LatentDiffusion",
                 'model = LatentDiffusion.from_pretrained("FOLDER")']  # fmt: skip
    parts = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        f"# {title}",
        "",
        "## Load it",
        "",
        *load,
        "```",
    ]
    parts += ["", "## Figures", "", *_figures(evaluations)]
    text = yaml.safe_dump({"model": dict(section)}, sort_keys=False, allow_unicode=True).rstrip()
    return "\n".join([*parts, "", "## Config", "", "```yaml", text, "```", ""])


def _figures(evaluations: Mapping[str, Config]) -> list[str]:
    """Return a table for each evaluation, with intervals if it has them and the hash of the data measured against."""
    lines: list[str] = []
    for place, content in evaluations.items():
        labels, values, intervals = (content.get(name) or {} for name in _MAPPINGS)
        lines += [f"`{place}`, of {content.get('n', '?')} images:", "", "| figure | value, 95% interval |", "|---|---|"]
        for name, value in filter(lambda item: _is_number(item[1]), values.items()):
            lines.append(f"| {labels.get(name, name)} | {value:.6g}{_interval(intervals.get(name))} |")
        if data := content.get("data_sha256"):
            lines += ["", f"Data: SHA-256 `{data}`."]
        lines.append("")
    return lines[:-1] if lines else ["None was measured (`ldm evaluate --out` into the run folder makes them)."]


def _interval(entry: Any) -> str:
    """Return an interval as text; "" for evaluations without."""
    bounds = [entry.get(side) if isinstance(entry, dict) else None for side in ("low", "high")]
    return ", {:.6g} to {:.6g}".format(*bounds) if all(map(_is_number, bounds)) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def evaluations_in(folder: Path, checkpoint_sha256: str | None) -> dict[str, Config]:
    """Read the evaluation.json files below a folder, by their paths in it: those of a checkpoint, by its hash."""
    found: dict[str, Config] = {}
    for file in sorted(folder.rglob("evaluation.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # no evaluation, or one of a full disk: the card goes without
        is_result = isinstance(content, dict) and all(isinstance(content.get(name) or {}, dict) for name in _MAPPINGS)
        if is_result and content.get("checkpoint_sha256") in (None, checkpoint_sha256):
            found[str(file.relative_to(folder))] = content
    return found
