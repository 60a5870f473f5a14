"""From images to features in which sets of images are compared: Inception, DINOv2, CLIP.

An extractor takes bytes, uint8 (B, 3, H, W), so that what is measured is what a file would hold. Its name goes into
the name of every value, its hash (of the weights) into every result. Only values of Inception, with torch-fidelity's
weights and resizing, may be called FID, KID or IS. Nothing is downloaded. Those that also have features of patches are
teachers in trainings (`ldm.training.alignment`).
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.bounds import Size
from ldm.conditioning.clip import CLIP_MEAN, CLIP_STD, DEFAULT_CLIP, ClipEmbedder, normalised
from ldm.errors import UserError
from ldm.weights.load import read

_log = logging.getLogger(__name__)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DINO_SIZES = {"s": "dinov2-small", "b": "dinov2-base", "l": "dinov2-large", "g": "dinov2-giant"}
_DINO_WIDTHS = {"s": 384, "b": 768, "l": 1024, "g": 1536}
_DINO_SIDE = 224


class Features(NamedTuple):
    """Features (B, d); where the extractor has them, logits of classes (B, K), and flat spatial features (B, s)."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A network whose features are compared: its name (no brackets), how it resizes images, a hash of its weights."""

    name: str
    resize: str

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the weights."""

    def to(self, device: torch.device) -> Extractor:
        """Move to a device and return itself."""

    def __call__(self, images: Tensor) -> Features:
        """Return float32 features on the CPU of images, uint8 (B, 3, H, W)."""


def weights_hash(*networks: nn.Module) -> str:
    """Return the SHA-256 of the weights' names and values."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class NetworkExtractor:
    """An extractor whose network is built at the first use."""

    name: str
    resize: str

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @cached_property
    def network(self) -> nn.Module:
        """Return the network in eval mode."""
        return self._build().eval().requires_grad_(False).to(self.device)

    def _build(self) -> nn.Module:
        raise NotImplementedError

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256 of the weights' names and values."""
        return weights_hash(self.network)

    def to(self, device: torch.device) -> Any:
        """Move to a device and return itself."""
        self.device = torch.device(device)
        if "network" in vars(self):
            self.network.to(self.device)
        return self

    def _checked(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(f"{self.name}: needs images uint8 (B, 3, H, W), not {images.dtype} {images.ndim}-d")
        return self._in_colour(images).to(self.device)

    def _in_colour(self, images: Tensor) -> Tensor:
        """Return images of 3 channels; grey ones are repeated. UserError for other numbers of channels."""
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if images.shape[1] != 3:
            raise UserError(f"{self.name}: images of {images.shape[1]} channels; features are of 1 (grey) or 3")
        return images


class Inception(NetworkExtractor):
    """Features of Inception v3 as ported by torch-fidelity: 2048 pooled, 1008 logits, 7x17x17 for sFID.

    weights: the file that torch-fidelity publishes, by default in torch's hub cache.
    """

    resize = "bilinear to 299x299 as TensorFlow 1 does, without antialiasing"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.weights = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE).expanduser()
        self._spatial: list[Tensor] = []

    @cached_property
    def name(self) -> str:
        """Return "inception" for torch-fidelity's weights, whose values are FID, KID, IS; for others add their hash."""
        if not self.weights.is_file():
            raise UserError(f"inception: no weights at {self.weights}; fetch {INCEPTION_URL} to there, or give a path")
        digest = file_hash(self.weights)
        return "inception" if INCEPTION_FILE.endswith(f"-{digest[:8]}.pth") else f"inception-{digest[:8]}"

    def _build(self) -> nn.Module:
        _log.info("%s: weights from %s", self.name, self.weights)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise UserError("inception: needs torch-fidelity; pip install 'latent-diffusion[eval]'") from error
        names = ["2048", "logits_unbiased"]
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity unpickles unchecked: it gets what was read here
            path = Path(folder) / INCEPTION_FILE
            torch.save(read(self.weights), path)
            try:
                network = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=path)
            except RuntimeError as error:
                raise UserError(f"{self.weights}: does not fit Inception; fetch {INCEPTION_URL} again") from error
        # ADM's sFID: the first 7 channels of TensorFlow's mixed_6/conv, in its order (height, width, channel).
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: self._spatial.append(out[:, :7]))
        return network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return features of images, uint8 (B, 3, H, W)."""
        pooled, logits = self.network(self._checked(images))
        spatial = rearrange(self._spatial.pop(), "b c h w -> b (h w c)")
        return Features(pooled.cpu(), logits.cpu(), spatial.cpu())


class PatchTransformer(NetworkExtractor):
    """An extractor that is a transformer of transformers: it has features of patches, on whatever grid is asked for.

    width: their channels. Its class token leads; the embeddings of its positions are interpolated.
    """

    width: int
    grid = None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (B, width, h, w) on a grid (h, w) of patches of images (B, C, H, W) in [-1, 1].

        The images are resized, bicubic as in the code of REPA (arXiv 2410.06940), to sides that have so many patches.
        UserError if the weights have another width.
        """
        config = self.network.config
        if config.hidden_size != self.width:
            raise UserError(f"{self.name}: its features have {config.hidden_size} channels, not {self.width}")
        x = normalised(self._in_colour(images), self.mean, self.std)
        x = F.interpolate(x, [side * config.patch_size for side in grid], mode="bicubic", align_corners=False)
        tokens = self._tokens(x)[:, 1:]
        return rearrange(tokens, "b (h w) d -> b d h w", h=grid[0], w=grid[1]).float()

    def _tokens(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Dino(PatchTransformer):
    """Features of DINOv2 (its class token, or patches), from a local folder or the local Hugging Face cache."""

    resize = f"antialiased bicubic to {_DINO_SIDE}x{_DINO_SIDE}"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]

    def __init__(self, size: str = "l", version: str | None = None) -> None:
        super().__init__()
        if size not in DINO_SIZES:
            raise UserError(f"dino: size {size!r} is not one of {', '.join(DINO_SIZES)}")
        self.name, self.width = f"dinov2-{size}", _DINO_WIDTHS[size]
        self.hub = f"facebook/{DINO_SIZES[size]}"
        self.version = version or self.hub

    def _build(self) -> nn.Module:
        from ldm.conditioning.tokenizers import load_pretrained

        network = load_pretrained("Dinov2Model", self.version, "DINOv2", hub=self.hub)
        if getattr(network.config, "num_register_tokens", 0):
            raise UserError(f"DINOv2 '{self.version}': has registers, which this network has not; use {self.hub}")
        return network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return features of images, uint8 (B, 3, H, W)."""
        x = self._checked(images).float() / 127.5 - 1
        x = F.interpolate(x, (_DINO_SIDE, _DINO_SIDE), mode="bicubic", antialias=True, align_corners=False)
        x = normalised(x.clamp(-1, 1), self.mean, self.std)
        return Features(self.network(pixel_values=x).pooler_output.float().cpu())

    def _tokens(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).last_hidden_state


class Clip(PatchTransformer):
    """Embeddings of CLIP's image model, of norm 1; the same weights score texts. width: channels of its patches."""

    name = "clip"
    resize = "largest centre square, antialiased bicubic to CLIP's size"
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, version: str = DEFAULT_CLIP, width: Size = 1024) -> None:
        super().__init__()
        self.embedder, self.width = ClipEmbedder(version), width

    def _build(self) -> nn.Module:
        return self.embedder.image_model

    def to(self, device: torch.device) -> Clip:
        """Move to a device and return itself."""
        self.embedder.device = torch.device(device)
        return super().to(device)

    def __call__(self, images: Tensor) -> Features:
        """Return features of images, uint8 (B, 3, H, W)."""
        return Features(self.embedder.embed_images(list(self._checked(images).float() / 127.5 - 1)).cpu())

    def _tokens(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state
