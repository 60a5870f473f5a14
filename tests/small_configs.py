"""Any config of the project at a size that trains in a second: overrides of its widths, and data made up to fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset

from ldm.cli.train import main
from ldm.config import instantiate, load, read
from ldm.config.files import follow_references, read_with_bases
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_model
from ldm.sampling.ddim import DDIM
from ldm.weights import load as checkpoint

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
FROM_FILES = {  # configs that are trained from files in the layouts that they expect, with the size that is seen
    "layout2img_coco": 32, "layout2img_openimages": 32, "semantic_synthesis_256": 32, "superres_bicubic": 32,
    "superres_bsr": 32, "inpainting": 32, "class2img_f4": 32, "lsun_bedrooms": 32, "retrieval_768": 128,
}  # fmt: skip
WIDTH = 32  # GroupNorm has 32 groups


def _ones(old: Sequence[int]) -> list[int]:
    return [1] * len(old)


# what is set in a node of each target; callables make the value from the old one, and need one
SMALL: dict[str, dict[str, Any]] = {
    "ldm.networks.unet.UNet": {
        "model_channels": WIDTH, "channel_mult": _ones, "num_res_blocks": 1, "transformer_depth": 1,
        "context_dim": lambda old: WIDTH,
    },
    "ldm.networks.dit.DiT": {"hidden_size": WIDTH, "depth": 1, "num_heads": 1},
    "ldm.networks.encoder_decoder.Architecture": {"channels": WIDTH, "channel_mult": _ones, "num_res_blocks": 1},
    "ldm.networks.discriminator.PatchDiscriminator": {"width": 4},
    "ldm.autoencoder.regularizers.VectorQuantizer": {"num_codes": 16},
    "ldm.autoencoder.losses.VQLoss": {"num_codes": 16, "disc_start": 1, "perceptual_loss": None},
    "ldm.autoencoder.losses.KLLoss": {"disc_start": 1, "perceptual_loss": None},
    "ldm.conditioning.labels.ClassConditioner": {"embed_dim": lambda old: WIDTH},
    "ldm.conditioning.text.TextConditioner": {"dim": WIDTH, "depth": 1},
    "ldm.conditioning.layout.LayoutConditioner": {"dim": WIDTH, "depth": 1},
    "ldm.conditioning.text.EmbeddingConditioner": {"dim": WIDTH},
}  # fmt: skip
TOKENIZER = "{target: ldm.conditioning.tokenizers.TrainedTokenizer, params: {max_length: 8, vocab_size: 128}}"
SHORT = [
    "lightning.trainer.accelerator=cpu",
    "lightning.trainer.accumulate_grad_batches=1",
    "lightning.trainer.num_sanity_val_steps=0",
    "lightning.trainer.val_check_interval=2",
    "lightning.trainer.log_every_n_steps=1",
    "lightning.callbacks.image_logger=null",
    "lightning.callbacks.progress=null",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
]


class MadeUp(Dataset):
    """Give items with a picture, a caption, a label, and what `tensors` (shape by key), `num_boxes` and `crop` say."""

    def __init__(
        self,
        size: int,
        channels: int = 3,
        tensors: Mapping[str, Sequence[int]] | None = None,
        num_boxes: int = 3,
        crop: bool = False,
    ) -> None:
        self.size, self.channels, self.tensors, self.num_boxes = size, channels, dict(tensors or {}), num_boxes
        self.crop = {"crop": torch.tensor([0.0, 0.0, 1.0, 1.0])} if crop else {}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)

        def draw(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator) * 2 - 1

        absent = torch.arange(self.num_boxes) > index
        boxes = torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(self.num_boxes, 4)
        return {
            "image": draw(self.channels, self.size, self.size),
            "caption": f"picture number {index}",
            "class_label": index,
            "boxes": boxes.masked_fill(absent[:, None], 0.0),
            "box_labels": torch.arange(self.num_boxes).masked_fill(absent, -1),
            **self.crop,
            **{key: draw(*shape) for key, shape in self.tensors.items()},
        }


def nodes(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find all nodes of a plain config with their paths, the outer ones first."""
    if isinstance(value, dict):
        if "target" in value:
            yield path, value
        for key, child in value.items():
            yield from nodes(child, f"{path}.{key}")
    if isinstance(value, list):
        for number, child in enumerate(value):
            yield from nodes(child, f"{path}.{number}")


def plain(file: Path) -> dict[str, Any]:
    """Read a config as plain values."""
    return read(file)


def narrowing(config: Mapping[str, Any]) -> list[str]:
    """Give the overrides that make a model small, start it without trained weights, and need no files."""
    words = list(SHORT)
    for path, node in [*nodes(config["model"], "model"), *nodes(config["training"], "training")]:
        params = node.get("params") or {}
        for name, value in SMALL.get(node["target"], {}).items():
            if not callable(value):
                words.append(f"{path}.params.{name}={'null' if value is None else value}")
            elif params.get(name) is not None:
                words.append(f"{path}.params.{name}={value(params[name])}")
        if node["target"].endswith(".HuggingFaceTokenizer"):
            words += [f"{path}=null", f"{path}={TOKENIZER}"]
        if "checkpoint" in node:
            words.append(f"{path}.checkpoint=null")
    return [*words, "training.allow_untrained_first_stage=true"]


def made_up_data(config: Mapping[str, Any]) -> tuple[list[str], MadeUp]:
    """Give the overrides that put made-up data in the place of a config's own, and the same data."""
    found = [(node["target"].rpartition(".")[2], node.get("params") or {}) for _, node in nodes(config["model"], "")]
    pixels = {"channel_mult": [1]}  # of an identity in the place of an autoencoder
    architecture = next((params for name, params in found if name == "Architecture"), pixels)
    levels = next((len(params["channel_mult"]) for name, params in found if name == "UNet"), 1)
    factor = 2 ** (len(architecture["channel_mult"]) - 1)
    size = max(32, factor * 2 ** max(levels - 1, 1))
    params = {"size": size, "channels": architecture.get("in_channels", 3), "tensors": {}}
    for name, options in found:
        params["tensors"] |= _tensors(name, options, size, factor)
        if name == "BoxTokenizer":
            params |= {"num_boxes": options["max_objects"], "crop": options.get("encode_crop", True)}
    node = {"target": f"{__name__}.MadeUp", "params": params}
    text = yaml.safe_dump(node, default_flow_style=True, width=10_000).strip()
    words = ["--allow", __name__]
    for split in ("train", "validation"):
        words += [f"data.params.{split}=null", f"data.params.{split}={text}"]
    return words, MadeUp(**params)


def _tensors(name: str, options: Mapping[str, Any], size: int, factor: int) -> dict[str, list[int]]:
    """Say which tensors a conditioner reads; a picture that is concatenated as it is has the size of the latent."""
    if name == "SpatialRescaler":
        return {options.get("key", "segmentation"): [options["in_channels"], size, size]}
    if name == "ImageConditioner":
        return {options["key"]: [options["channels"], size // factor, size // factor]}
    if name == "FirstStageConditioner":
        pictures = {options.get("key", "masked_image"): [3, size, size]}
        return pictures | ({options["mask_key"]: [1, size, size]} if "mask_key" in options else {})
    if name == "EmbeddingConditioner":
        return {options["key"]: [options["num_tokens"], WIDTH]}
    return {}


def pinned(file: Path) -> list[str]:
    """Give the overrides that keep what a model takes from the data section, for when that is replaced."""
    raw, resolved = follow_references(read_with_bases(file)).content, plain(file)
    words = []
    for section in ("model", "training"):
        pairs = zip(nodes(raw[section], section), nodes(resolved[section], section), strict=True)
        for (path, node), (_, known) in pairs:
            for name, value in (node.get("params") or {}).items():
                if isinstance(value, str) and value.startswith("${data."):
                    words.append(f"{path}.params.{name}={known['params'][name]}")
    return words


def train(config: Path, folder: Path, words: list[str]) -> Path:
    """Train for two steps from the command line; give the run folder."""
    assert main(["--base", str(config), "-t", "--max_steps", "2", "-l", str(folder / "logs"), *words]) == 0
    (run,) = (folder / "logs").iterdir()
    return run


@torch.no_grad()
def draw(run: Path, batch: dict[str, Any]) -> torch.Tensor:
    """Draw samples under the conditions of a batch from a run folder, or reconstruct its pictures."""
    config = load(run / "configs" / "config.yaml", check=False)
    if not config.model.target.endswith(LatentDiffusion.__name__):
        model = instantiate(config.model, "model").eval()
        checkpoint.load_into(model, run)
        return model(batch["image"])[0]
    model = load_model(run, CPU).model
    shape = model.first_stage_model.latent_shape(*batch["image"].shape[2:])
    denoise = model.denoiser(model.condition(batch))
    noise = model.process.prior_std * torch.randn(len(batch["image"]), *shape)
    steps = list(DDIM(steps=2)(denoise, noise, model.process))
    return model.decode(steps[-1].x)
