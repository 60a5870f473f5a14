"""The latent diffusion model: a denoising network in the latent space of a frozen autoencoder (sections 3.2 and 3.3).

    model = LatentDiffusion.from_pretrained("logs/RUN")
    images = model.sample(["a red circle above a blue square"], steps=20, guidance=3.0, seed=0)

A plain module: it knows neither trainer nor command line. Its root names are the published ones: the tables of a
discrete process, `scale_factor` if measured, model, first_stage_model, cond_stage_model; beside them `latent_mean` and
`latent_std` if channels have their own.

Legend: x image (B, C, H, W) in [-1, 1], z scaled latent (B, c, h, w), t time (B,) in the process's unit, eps noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.aliases import Batch, Noise
from ldm.conditioning.base import Conditioner, Conditioning, JointConditioner
from ldm.diffusion.guidance import extrapolate, halves, in_one_batch
from ldm.diffusion.objective import Objective, Terms, variance_nats
from ldm.diffusion.prediction import Denoise, Denoised, Epsilon, Prediction, check_prediction
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.conditional_network import ConditionalNetwork, check_fit
from ldm.models.generate import Request, generate, with_strength
from ldm.models.graphs import Graphs
from ldm.models.guidance import Guidance
from ldm.models.latent_scale import LatentScale, channel_moments, unit_variance_scale
from ldm.sampling import make_sampler

Network = Callable[[Tensor, Tensor, Conditioning | None], Tensor]  # x, t, conditioning -> what is predicted


class LatentDiffusion(nn.Module):
    """Denoise latents under a condition, and turn noise into images.

    A batch holds images under `image_key`, or cached encoder outputs under "moments", and what the conditioner reads.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: Autoencoder | IdentityAutoencoder,
        process: Process,
        conditioner: Conditioner | JointConditioner | None = None,
        prediction: Prediction | None = None,
        latent_scale: LatentScale | float | str = 1.0,
        image_key: str = "image",
        latent_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Join the parts. UserError, naming both, if two of them do not fit together.

        Args:
            network: Backbone, called with (x_t, time, context=, y=); with twice the channels it learns variances, too.
            autoencoder: First stage; it is frozen and stays in eval mode.
            process: Forward process.
            conditioner: From a batch to what the network is conditioned on; None for an unconditional model.
            prediction: What the network predicts (default: eps).
            latent_scale: Factor that brings latents to unit variance, "measure", or a `LatentScale` of each channel.
            image_key: Name of the images in a batch.
            latent_size: Side, or (height, width), of the latents in training (default: as the autoencoder's images).
        """
        super().__init__()
        self.image_key, self.latent_scale = image_key, LatentScale.of(latent_scale)
        self.prediction = prediction or Epsilon()
        self.graphs = Graphs()
        self.adapters: list[str] = []  # what identifies those in the weights
        self.config: dict[str, Any] | None = None  # section `model` of the config that it was loaded with
        self.latent_size, self.image_size = latent_size, _image_size(autoencoder, latent_size)
        check_prediction(self.prediction, process)
        self._process, self.table_names = process, tuple(process.buffers())
        for name, table in process.buffers().items():
            self.register_buffer(name, table)
        is_measured = self.latent_scale.is_measured
        scale = torch.tensor(1.0 if is_measured else float(self.latent_scale.value))
        self.register_buffer("scale_factor", scale, persistent=is_measured)
        if self.latent_scale.has_channels:
            mean, std = self.latent_scale.channels(autoencoder.latent_channels)
            self.register_buffer("latent_mean", mean)
            self.register_buffer("latent_std", std)
        self.scale_is_known = not is_measured
        self.register_load_state_dict_post_hook(_note_loaded_scale)

        self.model = ConditionalNetwork(network)
        self.first_stage_model = autoencoder.requires_grad_(False).eval()
        self.cond_stage_model = conditioner
        if conditioner is not None:
            conditioner.use_first_stage(self.first_stage_model)
        check_fit(network, autoencoder.latent_channels, conditioner)
        self.learns_variance = getattr(network, "out_channels", 0) == 2 * autoencoder.latent_channels
        if self.learns_variance and process.num_steps is None:
            raise UserError(
                f"{type(network).__name__}: out_channels is {network.out_channels}, half of them for a variance, which "
                f"takes the steps of a discrete process to learn; set it to {autoencoder.latent_channels}"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        weights: str = "ema",
        device: torch.device | str = "cpu",
        adapters: Sequence[str] = (),
    ) -> LatentDiffusion:
        """Load a model in eval mode from a run folder, a checkpoint in one, an exported file, or a published zip.

        Folders of diffusers as well, also by their name on the hub if they are in the local cache.

        weights: "ema" for the averaged weights where there are any, "raw" for the trained ones, or another average.
        adapters: see `load_adapter`. UserError for absent or damaged files, and for a model of another kind.
        """
        from ldm.models.loading import ModelSource, load_model

        return load_model(ModelSource(path, weights=weights, adapters=tuple(adapters)), device).model

    def load_adapter(self, adapter: str) -> None:
        """Add an adapter (LoRA, DoRA), `FILE` or a share of it, `FILE:0.8`, to the weights; a run folder serves, too.

        UserError for an adapter of another base, and for one that is in the weights already.
        """
        from ldm.models.adapting import merge

        merge(self, self.config, [adapter])

    def save_pretrained(
        self, path: str | Path, config: Mapping[str, Any] | None = None, format: str = "safetensors"
    ) -> Path:
        """Write weights and config, as `from_pretrained` reads them. Returns the path. UserError for what cannot be.

        Args:
            path: File, or new folder.
            config: Section `model` from which this model was built; by default the one with which it was loaded.
            format: One `safetensors` file, a folder of `diffusers`, or a file of `compvis`, which has no config.
        """
        from ldm.models.saving import save_model

        return save_model(self, path, config, format)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set the mode; the first stage stays in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        return self

    @property
    def process(self) -> Process:
        """The forward process, with the tables of this module and on its device."""
        return self._process.with_buffers({name: getattr(self, name) for name in self.table_names})

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.scale_factor.device

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.first_stage_model.in_channels

    @property
    def side_multiple(self) -> int:
        """Number that must divide the sides of an image, for the first stage and for the network."""
        return self.first_stage_model.factor * self.model.diffusion_model.size_multiple

    @property
    def drops_conditions(self) -> bool:
        """Whether some condition is dropped in training, so that 'no condition' is known."""
        parts = [self.cond_stage_model, *self.conditioners()]
        return any(part.drop_rate for part in parts if part is not None)

    def with_weights(self, weights: Mapping[str, Tensor]) -> LatentDiffusion:
        """Return a model that shares all of this but has other weights, by their names in the network `model`."""
        other = copy(self)
        other._modules = {**self._modules, "model": self.model.with_weights(weights)}
        other.graphs = Graphs()
        return other

    # --- images and latents ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Encode images (B, C, H, W) to scaled latents (B, c, h, w); `noise` draws for a KL posterior."""
        return self.scaled(self.first_stage_model.encode(x, noise).float())

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Decode scaled latents (B, c, h, w) to images; `quantize` first where the autoencoder has a codebook."""
        z = z / self.scale_factor
        if self.latent_scale.has_channels:
            z = z * self.latent_std + self.latent_mean
        return self.first_stage_model.decode(z, quantize=quantize)

    def scaled(self, z: Tensor) -> Tensor:
        """Return latents (B, c, h, w) of the first stage as diffusion sees them."""
        if self.latent_scale.has_channels:
            z = (z - self.latent_mean) / self.latent_std
        return self.scale_factor * z

    @torch.no_grad()
    def latents(self, batch: Batch, noise: Noise | None = None) -> Tensor:
        """Return the scaled latents of a batch, from its cached "moments" or from its images."""
        source = self.source(batch)
        if "moments" in batch:
            return self.scaled(self.first_stage_model.latent_from_moments(source.float(), noise))
        return self.encode(source, noise)

    def source(self, batch: Batch) -> Tensor:
        """Return what of a batch is encoded: its cached "moments" or its images. UserError if it has neither."""
        key = "moments" if "moments" in batch else self.image_key
        if key not in batch:
            raise UserError(f"batch: there is no '{key}'; the data set has {', '.join(sorted(batch))}")
        return batch[key]

    def measure_scale(
        self, latents: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Set scale_factor to 1 / std of these latents, or mean and std of their channels.

        The iterator must be lazy: it encodes with scale_factor = 1.
        """
        self.scale_factor.fill_(1.0)
        if self.latent_scale.has_channels:
            mean, std = channel_moments(latents, sum_over_ranks)
            self.latent_mean.copy_(mean)
            self.latent_std.copy_(std)
        else:
            self.scale_factor.copy_(unit_variance_scale(latents, sum_over_ranks))
        self.scale_is_known = True

    # --- denoising -------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch, drop: Any = None) -> Conditioning | None:
        """Embed what the conditioner reads from a batch; `drop` marks samples that get the null conditioning."""
        return None if self.cond_stage_model is None else self.cond_stage_model(batch, drop)

    def denoiser(
        self,
        conditioning: Conditioning | None = None,
        guidance: Guidance | float = 1.0,
        negative: Conditioning | None = None,
        guide: Denoise | None = None,
        network: Network | None = None,
    ) -> Denoise:
        """Close the conditioning over the network: (x_t, t) -> (x_0, eps), under guidance; it serves one walk.

        Guided is away from the null conditioning, from `negative`, or from what `guide` predicts. `network` is called
        in place of the model's own, which it wraps. UserError for a scale where there is neither a conditioning nor a
        guide, and for a `negative` that would have no effect.
        """
        guidance = Guidance.of(guidance)
        if not guidance.is_on:
            if negative is not None:
                raise UserError("negative: it has no effect without guidance; give a scale other than 1")
            return self._alone(conditioning, network)
        alone = self._alone(conditioning, network)
        if guide is not None:
            return guidance.applied(lambda x_t, t: (alone(x_t, t), guide(x_t, t)), alone, self.process)
        if conditioning is None:
            raise UserError(f"guidance: scale {guidance.scale:g} without condition; use 1, or give a guide")
        away = self.cond_stage_model.unconditional(conditioning.batch_size) if negative is None else negative
        both = Conditioning.stack([away, conditioning])
        if guidance.is_linear:
            return self._alone(both, network, guidance.scale)
        return guidance.applied(in_one_batch(self._alone(both, network)), alone, self.process)

    def _alone(
        self, conditioning: Conditioning | None, network: Network | None = None, scale: float | None = None
    ) -> Denoise:
        """Close a conditioning over the network; with a scale that of a batch twice as large, [away from, toward].

        Linear guidance is done here, not by a wrapper, so that it is no further from the sampler to the network.
        """
        process, network = self.process, self.model if network is None else network

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            if scale is not None:
                x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            level = process.level(t)
            output = network(*self.prediction.inputs(x_t, level), conditioning)
            output, share = _without_variance(output.float(), x_t)
            denoised = self.prediction.denoised(output, x_t, level).with_share(share)
            return denoised if scale is None else extrapolate(*halves(denoised), scale)

        return denoise

    def loss(
        self,
        z: Tensor,
        conditioning: Conditioning | None,
        t: Tensor,
        eps: Tensor,
        objective: Objective,
        hidden: list[Tensor] | None = None,
    ) -> Terms:
        """Return the terms of an objective for scaled latents z at times t (B,) with the given noise (equation 3).

        hidden: gets the states behind the blocks of a network that `ShowsHidden`.
        """
        level = self.process.level(t)
        z_t = level.diffuse(z, eps)
        output = self.model(*self.prediction.inputs(z_t, level), conditioning, hidden)
        output, share = _without_variance(output.float(), z_t)
        terms = objective(output, self.prediction.target(z, eps, level), level)
        if share is None:
            return terms
        guess = self.prediction.denoised(output.detach(), z_t, level).x0
        return objective.with_variance(terms, variance_nats(self.process, share, z, z_t, guess, t.long()))

    # --- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self,
        conditions: Mapping[str, Sequence[Any] | Tensor] | Sequence[Any] | Tensor | int = 1,
        *,
        steps: int | None = None,
        guidance: Guidance | float = 1.0,
        seed: int = 0,
        sampler: str = "ddim",
        size: tuple[int, int] | None = None,
        batch_size: int = 4,
        negative: Mapping[str, Sequence[Any] | Tensor] | Sequence[Any] | Tensor | None = None,
        images: Tensor | None = None,
        strength: float = 0.75,
        **options: Any,
    ) -> Tensor:
        """Draw one image a condition: (N, C, H, W), about in [-1, 1], image i from seed + i whatever the batch size.

        Args:
            conditions: What to draw: a sequence for the model's only conditioner (texts, labels, images), a mapping of
                batch keys to sequences for several, or the number of images for an unconditional model.
            steps: Steps of the sampler (default: its own).
            guidance: Scale of classifier-free guidance (1 is none), or any `Guidance`.
            seed: Seed of the first image.
            sampler: Name of the sampler, a file in ldm/sampling.
            size: (height, width) of the images (default: as in training).
            batch_size: Images drawn at a time.
            negative: Conditions to be guided away from, as `conditions`; needs guidance.
            images: (N, C, H, W) in [-1, 1], to start from instead of from noise (SDEdit, arXiv 2108.01073).
            strength: Share of the steps that is taken from `images`; 1 leaves hardly anything of them.
            options: Further fields of the sampler, such as eta or grid.
        """
        conditions, count = self._conditions(conditions)
        walk = make_sampler(sampler, steps=steps, **options)
        if images is not None:
            walk, size = with_strength(walk, strength, self.process), tuple(images.shape[2:])
        guidance = Guidance.of(guidance).ready(self, negative is not None)
        request = Request(
            range(seed, seed + count), size or self._size(), conditions, guidance, batch_size, images=images,
            negative=None if negative is None else self._conditions(negative)[0],
        )  # fmt: skip
        return torch.cat(list(generate(self, walk, request)))

    def _conditions(self, given: Any) -> tuple[dict[str, Any], int]:
        """Return the columns of a batch by their keys, and the number of samples."""
        if isinstance(given, int):
            if self.cond_stage_model is not None:
                raise UserError(f"sample: this model is conditional; give one condition for each image, not {given}")
            return {}, given
        if not isinstance(given, Mapping):
            keys = list(dict.fromkeys(part.key for part in self.conditioners() if part.entry_for((1, 1)) is None))
            if len(keys) != 1:
                raise UserError(f"sample: this model is conditioned on {', '.join(keys) or 'nothing'}; give a mapping")
            given = {keys[0]: given}
        count = len(next(iter(given.values()))) if given else 1
        return dict(given), count

    def entries_for(self, size: tuple[int, int], count: int) -> dict[str, list[Any]]:
        """Return what the batch of `count` images of (height, width) holds unless one is asked for it: their sizes."""
        entries = {part.key: part.entry_for(size) for part in self.conditioners()}
        return {key: [entry] * count for key, entry in entries.items() if entry is not None}

    def conditioners(self) -> Iterator[Conditioner]:
        """Yield the conditioners of the model."""
        parts = () if self.cond_stage_model is None else self.cond_stage_model.modules()
        return (part for part in parts if isinstance(part, Conditioner))

    def _size(self) -> tuple[int, int]:
        if self.image_size is None:
            raise UserError("sample: the size of the training images is not known; give size=(height, width)")
        return self.image_size


def _without_variance(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the prediction in an output, and the share of a learned variance if the network has channels for it."""
    if output.shape[1] == x_t.shape[1]:
        return output, None
    output, values = output.chunk(2, dim=1)
    return output, (values + 1) / 2


def _image_size(
    autoencoder: Autoencoder | IdentityAutoencoder, latent_size: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return (height, width) of the training images, or None where nothing says it."""
    if latent_size is not None:
        height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
        return height * autoencoder.factor, width * autoencoder.factor
    if isinstance(autoencoder, IdentityAutoencoder):
        return None
    return autoencoder.architecture.resolution, autoencoder.architecture.resolution


def _note_loaded_scale(module: LatentDiffusion, incompatible: Any) -> None:
    """Remember that a state dict brought the latent scale."""
    if module.latent_scale.is_measured and "scale_factor" not in incompatible.missing_keys:
        module.scale_is_known = True
