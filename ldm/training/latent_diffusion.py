"""Second stage: a diffusion model in the latent space of a frozen autoencoder (sections 3.2, 3.3; equations 2 and 3).

L = E || target - network(z_t, t, tau(y)) ||^2 with z = scale * encode(x), z_t = alpha_t z + sigma_t eps and the target
eps, z or v. With an identity autoencoder this is a diffusion model on pixels. The state dict has the published layout:
the schedule's tables, `logvar` if learned, `scale_factor` if measured, model, model_ema, first_stage_model,
cond_stage_model.

Legend: x image (B, C, H, W) in [-1, 1], z scaled latent (B, c, h, w), t step (B,) in 0..T-1, eps noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioner, Conditioning, JointConditioner
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.objective import Objective, Terms
from ldm.diffusion.prediction import Denoise, Epsilon, Parameterization, Prediction
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.conditional_network import ConditionalNetwork, check_fit
from ldm.networks.transformer import TransformerEncoder
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.latent_scale import LatentScale, unit_variance_scale
from ldm.training.meters import LossByTimestep
from ldm.training.module import TrainingModule
from ldm.training.optimization import Optimization, stepwise
from ldm.training.randomness import MEASURE, Draws, spread_timesteps

_log = logging.getLogger(__name__)
_FITTING_STD = (0.7, 1.4)
Noise = Callable[[tuple[int, ...]], Tensor]
Batch = Mapping[str, Any]


class LatentDiffusion(TrainingModule):
    """Train a conditional diffusion model on latents.

    `autoencoder` is frozen, stays in eval mode and out of optimiser and average; `ema_decay` None keeps no average.
    A batch holds images under `image_key`, or cached encoder outputs under "moments", and what the conditioner reads.
    UserError if network, autoencoder and conditioner do not fit together, naming them.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: Autoencoder,
        schedule: Schedule,
        conditioner: Conditioner | JointConditioner | None = None,
        parameterization: Parameterization | None = None,
        objective: Objective | None = None,
        ema_decay: float | None = 0.9999,
        latent_scale: LatentScale | float | str = 1.0,
        optimization: Optimization | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        image_key: str = "image",
    ) -> None:
        super().__init__(learning_rate=1e-4)
        self.image_key = image_key
        self.parameterization = parameterization or Epsilon()
        self.objective = objective or Objective()
        self.optimization = optimization or Optimization()
        self.gradient_clip = self.optimization.gradient_clip
        self.learn_logvar, self.latent_scale = learn_logvar, LatentScale.of(latent_scale)
        self._register_tables(schedule, logvar_init)
        self._scale_is_known = not self.latent_scale.is_measured
        self.register_load_state_dict_post_hook(_note_loaded_scale)

        self.model = ConditionalNetwork(network)
        self.model_ema = None if ema_decay is None else ExponentialMovingAverage(self.model, ema_decay)
        self.first_stage_model = autoencoder.requires_grad_(False).eval()
        self.cond_stage_model = conditioner
        if conditioner is not None:
            conditioner.use_first_stage(self.first_stage_model)
        check_fit(network, autoencoder.latent_channels, conditioner)
        self._quartiles = LossByTimestep(schedule.num_steps)

    def _register_tables(self, schedule: Schedule, logvar_init: float) -> None:
        for name, table in schedule.buffers().items():
            self.register_buffer(name, table)
        self.register_buffer("vlb_weights", self.parameterization.vlb_weights(schedule), persistent=False)
        logvar = torch.full((schedule.num_steps,), float(logvar_init))
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        is_measured = self.latent_scale.is_measured
        scale = torch.tensor(1.0 if is_measured else float(self.latent_scale.value))
        self.register_buffer("scale_factor", scale, persistent=is_measured)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Switch mode; the first stage stays in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        return self

    # --- the model -------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """Return the forward process on the device of the model."""
        return Schedule(**{field.name: getattr(self, field.name) for field in fields(Schedule)})

    @property
    def averaged(self) -> nn.Module:
        """Return the conditional network, the only part that is averaged."""
        return self.model

    @property
    def num_steps(self) -> int:
        """Return T."""
        return len(self.betas)

    @torch.no_grad()
    def encode_images(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Encode images (B, C, H, W) to scaled latents (B, c, h, w); `noise` draws for a KL posterior."""
        return self.scale_factor * self.first_stage_model.encode(x, noise).float()

    def decode_latents(self, z: Tensor, snap: bool = True) -> Tensor:
        """Decode scaled latents (B, c, h, w) to images; `snap` quantises first where the autoencoder has a codebook."""
        return self.first_stage_model.decode(z / self.scale_factor, snap=snap)

    @torch.no_grad()
    def latents(self, batch: Batch, noise: Noise | None = None) -> Tensor:
        """Return the scaled latents of a batch, from its cached "moments" or from its images."""
        if "moments" in batch:
            return self.scale_factor * self.first_stage_model.latent_from_moments(batch["moments"].float(), noise)
        return self.encode_images(self._source(batch), noise)

    def _source(self, batch: Batch) -> Tensor:
        """Return what a batch has to be encoded: its cached "moments" or its images."""
        key = "moments" if "moments" in batch else self.image_key
        if key not in batch:
            raise UserError(f"batch: there is no '{key}'; the data set gives {', '.join(sorted(batch))}")
        return batch[key]

    def condition(self, batch: Batch, drop: Any = None) -> Conditioning | None:
        """Embed what the conditioner reads from a batch; `drop` marks samples that get the null conditioning."""
        return None if self.cond_stage_model is None else self.cond_stage_model(batch, drop)

    def denoiser(self, conditioning: Conditioning | None) -> Denoise:
        """Close the conditioning over the network: (x_t, t) -> (x0, eps)."""
        schedule = self.schedule

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            return self.parameterization.predict(schedule, self.model(x_t, t, conditioning).float(), x_t, t)

        return denoise

    def guided(self, conditioning: Conditioning | None, scale: float) -> Denoise:
        """Return a denoiser under classifier-free guidance; scale 1, or no conditioning, is no guidance."""
        if conditioning is None or scale == 1.0:
            return self.denoiser(conditioning)
        unconditional = self.cond_stage_model.unconditional(conditioning.batch_size)
        return classifier_free(self.denoiser(Conditioning.stack([unconditional, conditioning])), scale)

    # --- the loss --------------------------------------------------------------------------------------------------

    def terms(self, z: Tensor, conditioning: Conditioning | None, t: Tensor, noise: Tensor) -> Terms:
        """Return the terms of the objective for scaled latents z at steps t with the given noise."""
        schedule = self.schedule
        output = self.model(schedule.diffuse(z, t, noise), t, conditioning).float()
        target = self.parameterization.target(schedule, z, noise, t)
        return self.objective(output, target, t, vlb_weights=self.vlb_weights, logvar=self.logvar)

    def loss(
        self, z: Tensor, conditioning: Conditioning | None, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and what is logged of it, under the published names without "train/" or "val/"."""
        terms = self.terms(z, conditioning, t, noise)
        return terms.loss, self._logs(terms)

    def _logs(self, terms: Terms) -> dict[str, Tensor]:
        logs = {"loss_simple": terms.simple.mean(), "loss_vlb": terms.vlb, "loss": terms.loss}
        if self.learn_logvar:
            logs |= {"loss_gamma": terms.gamma, "logvar": self.logvar.mean()}
        return {name: value.detach() for name, value in logs.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw everything by (seed, number of the sample) and return the loss."""
        draws = self.keyed_draws(len(self._source(batch)))
        z = self.latents(batch, draws.normal)  # (B, c, h, w)
        drop = None if self.cond_stage_model is None else self.cond_stage_model.draw_drop(len(z), draws.uniform)
        t, noise = draws.timesteps(len(z), self.num_steps), draws.normal(z.shape)
        loss, logs = self.loss(z, self.condition(batch, drop), t, noise)
        self.record(logs)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss at fixed steps and noise, with the raw weights and with the averaged ones (suffix _ema)."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same of the data set `test`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        numbers = self.evaluation_numbers(len(self._source(batch)))
        draws = self.evaluation_draws(numbers)
        z = self.latents(batch, draws.normal)
        t, noise = spread_timesteps(numbers, self.num_steps).to(self.device), draws.normal(z.shape)
        conditioning = self.condition(batch)
        self._log_terms(self.terms(z, conditioning, t, noise), t, split, "")
        if self.model_ema is not None:
            with self.ema_scope():
                self._log_terms(self.terms(z, conditioning, t, noise), t, split, "_ema")

    def _log_terms(self, terms: Terms, t: Tensor, split: str, suffix: str) -> None:
        self._quartiles.add(f"{split}/loss_simple{suffix}", terms.simple, t)
        self.log_means({f"{split}/{name}{suffix}": value for name, value in self._logs(terms).items()}, len(t))

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the mean loss in each quarter of the time axis."""
        super().on_validation_epoch_end()
        for name, table in self._quartiles.take().items():
            table = self.trainer.strategy.reduce(table, reduce_op="sum")
            self.log_dict(LossByTimestep.means(name, table), sync_dist=True)

    # --- optimisation ----------------------------------------------------------------------------------------------

    def optimized_parameters(self) -> list[nn.Parameter]:
        """List what is trained: the network, the conditioner as far as it is trainable, a learned logvar."""
        parameters = [*self.model.parameters()]
        if self.cond_stage_model is not None:
            parameters += self.cond_stage_model.parameters()
        if self.learn_logvar:
            parameters.append(self.logvar)
        return [parameter for parameter in parameters if parameter.requires_grad]

    def networks(self) -> list[nn.Module]:
        """List the parts worth compiling."""
        return [self.model.diffusion_model]

    def setup(self, stage: str) -> None:
        """Freeze the published text encoder's unused output layer, for which no gradient would ever arrive."""
        if self.cond_stage_model is not None:
            for module in self.cond_stage_model.modules():
                if isinstance(module, TransformerEncoder):
                    module.to_logits.requires_grad_(False)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build AdamW, fused unless a gradient scaler has to look at the gradients first, and the step schedule."""
        optimizer = self.optimization.adamw(self.optimized_parameters(), self.learning_rate, fused=self.may_fuse)
        return stepwise(optimizer, self.optimization.scheduler(optimizer))

    # --- the latent scale ------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Measure the latent scale of a new run before anything uses it; of a given one, tell whether it fits."""
        if self.trainer.ckpt_path is not None or isinstance(self.first_stage_model, IdentityAutoencoder):
            return
        self.trainer.fit_loop.setup_data()
        # In global batches: another number of ranks, or accumulation, measures the same samples.
        num_batches = self.latent_scale.num_batches * self.trainer.accumulate_grad_batches
        latents = self._first_latents(islice(iter(self.trainer.train_dataloader), num_batches))
        if not self._scale_is_known:
            self._scale_from_bytes(latents)
            _log.info("latent scale: %.5g, measured", float(self.scale_factor))
            return
        std = 1 / float(unit_variance_scale(latents, self._sum_over_ranks))
        level = logging.INFO if _FITTING_STD[0] <= std <= _FITTING_STD[1] else logging.WARNING
        _log.log(level, "scaled latents have standard deviation %.3g (diffusion expects about 1)", std)

    def _first_latents(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        first = 0
        for batch in batches:
            count = len(self._source(batch))
            draws = Draws.of_samples(self.device, self.numbers(first, count), MEASURE, self.seed)
            first += count * self.world_size
            yield self.latents(self.transfer_batch_to_device(batch, self.device, 0), draws.normal)

    def measure_scale(self, batches: Iterable[Batch], noise: Noise | None = None) -> None:
        """Set the latent scale to 1 / std of the latents of these batches, over all ranks."""
        self._scale_from_bytes(self.latents(batch, noise) for batch in batches)

    def _scale_from_bytes(self, latents: Iterator[Tensor]) -> None:
        """Set the scale by latents that are encoded as they are asked for, with scale 1."""
        self.scale_factor.fill_(1.0)
        self.scale_factor.copy_(unit_variance_scale(latents, self._sum_over_ranks))
        self._scale_is_known = True

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")


def _note_loaded_scale(module: nn.Module, incompatible: Any) -> None:
    """Remember that a state dict brought the latent scale."""
    if module.latent_scale.is_measured and "scale_factor" not in incompatible.missing_keys:
        module._scale_is_known = True
