"""Training of the second stage: a diffusion model in the latent space of a frozen autoencoder (equations 2 and 3).

The module holds a `LatentDiffusion`, an objective and an average of the network's weights; it adds draws that belong to
samples, the optimiser, evaluation and logs. Its state dict is that of the model with `model_ema` and, if learned,
`logvar`, as published.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ldm.aliases import Batch
from ldm.bounds import Fraction
from ldm.diffusion.objective import Objective, Terms
from ldm.diffusion.times import golden_ratio_uniforms
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.latent_scale import unit_variance_scale
from ldm.networks.transformer import TransformerEncoder
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.meters import LossByTimestep
from ldm.training.module import DoesNotFit, TrainingModule
from ldm.training.optimization import Optimization, stepwise
from ldm.training.randomness import MEASURE, Draws

_log = logging.getLogger(__name__)
_FITTING_STD = (0.7, 1.4)


class DiffusionTraining(TrainingModule):
    """Train a latent diffusion model; its first stage is frozen and stays out of optimiser and average."""

    root_parts = ("model", "objective")

    def __init__(
        self,
        model: LatentDiffusion,
        objective: Objective | None = None,
        ema_decay: Fraction | None = 0.9999,
        optimization: Optimization | None = None,
    ) -> None:
        """Take the model to train. UserError for an objective that its process cannot have.

        Args:
            model: The model.
            objective: Loss and density of training times (default: mean squared error, uniform).
            ema_decay: Decay of the average of the network's weights; None keeps no average.
            optimization: Optimiser and schedule (default: AdamW).
        """
        super().__init__(learning_rate=1e-4)
        self.model = model
        self.objective = (objective or Objective()).bind(model.process, model.prediction)
        self.optimization = optimization or Optimization()
        self.gradient_clip = self.optimization.gradient_clip
        self.model_ema = None if ema_decay is None else ExponentialMovingAverage(model.model, ema_decay)
        self._quartiles = LossByTimestep()

    @property
    def image_key(self) -> str:
        """Name of the images in a batch."""
        return self.model.image_key

    @property
    def averaged(self) -> nn.Module:
        """The conditional network, the only part that is averaged."""
        return self.model.model

    # --- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss; every draw is a function of (seed, number of the sample)."""
        model, draws = self.model, self.keyed_draws(len(self.model.source(batch)))
        z = model.latents(batch, draws.normal)  # (B, c, h, w)
        drop = None if model.cond_stage_model is None else model.cond_stage_model.draw_drop(len(z), draws.uniform)
        t = self.objective.times(draws.uniform((len(z),)), model.process).to(self.device, non_blocking=True)
        terms = model.loss(z, model.condition(batch, drop), t, draws.normal(z.shape), self.objective)
        self.record(self.logs(terms))
        return terms.loss

    def logs(self, terms: Terms) -> dict[str, Tensor]:
        """Return what is logged of a loss, under the published names without "train/" or "val/"."""
        logs = {"loss_simple": terms.simple.mean(), "loss": terms.loss}
        if terms.vlb is not None:
            logs["loss_vlb"] = terms.vlb
        if self.objective.learn_logvar:
            logs |= {"loss_gamma": terms.gamma, "logvar": self.objective.logvar.mean()}
        return {name: value.detach() for name, value in logs.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss at fixed times and noise, with the raw weights and with the averaged ones (suffix _ema)."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same of the data set `test`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        model = self.model
        numbers = self.evaluation_numbers(len(model.source(batch)))
        draws, u = self.evaluation_draws(numbers), golden_ratio_uniforms(torch.from_numpy(numbers))
        z = model.latents(batch, draws.normal)
        t, eps = self.objective.times(u.float(), model.process).to(self.device), draws.normal(z.shape)
        conditioning = model.condition(batch)
        self._log_terms(model.loss(z, conditioning, t, eps, self.objective), u, split, "")
        if self.model_ema is not None:
            with self.ema_scope():
                self._log_terms(model.loss(z, conditioning, t, eps, self.objective), u, split, "_ema")

    def _log_terms(self, terms: Terms, u: Tensor, split: str, suffix: str) -> None:
        self._quartiles.add(f"{split}/loss_simple{suffix}", terms.simple, u)
        self.log_means({f"{split}/{name}{suffix}": value for name, value in self.logs(terms).items()}, len(u))

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the mean loss in each quarter of the training times."""
        super().on_validation_epoch_end()
        for name, table in self._quartiles.take().items():
            table = self.trainer.strategy.reduce(table, reduce_op="sum")
            self.log_dict(LossByTimestep.means(name, table), sync_dist=True)

    # --- optimisation ----------------------------------------------------------------------------------------------

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Return what is trained: the network, the conditioner as far as it is trainable, a learned logvar."""
        parts = (self.model.model, self.model.cond_stage_model, self.objective)
        parameters = [parameter for part in parts if part is not None for parameter in part.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def networks(self) -> list[nn.Module]:
        """Return the parts worth compiling."""
        return [self.model.model.diffusion_model]

    def setup(self, stage: str) -> None:
        """Freeze the published text encoder's unused output layer, for which no gradient would ever arrive."""
        if self.model.cond_stage_model is not None:
            for module in self.model.cond_stage_model.modules():
                if isinstance(module, TransformerEncoder):
                    module.to_logits.requires_grad_(False)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build AdamW, fused unless a gradient scaler has to look at the gradients first, and the step schedule."""
        optimizer = self.optimization.adamw(self.optimized_parameters(), self.learning_rate, fused=self.may_fuse)
        return stepwise(optimizer, self.optimization.scheduler(optimizer))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of a run with another process, whose tables would replace those of the config unsaid."""
        super().on_load_checkpoint(checkpoint)
        for name, table in self.model.process.buffers().items():
            saved = checkpoint["state_dict"].get(name)
            if saved is not None and saved.shape == table.shape and not torch.allclose(saved, table.cpu(), rtol=1e-4):
                raise DoesNotFit(f"model.params.process: the run has another process ({name} differs)")

    # --- the latent scale ------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Measure the latent scale of a new run before anything uses it; of a given one, log whether it fits."""
        model = self.model
        if self.trainer.ckpt_path is not None or isinstance(model.first_stage_model, IdentityAutoencoder):
            return
        self.trainer.fit_loop.setup_data()
        # In global batches: another number of ranks, or accumulation, measures the same samples.
        num_batches = model.latent_scale.num_batches * self.trainer.accumulate_grad_batches
        latents = self._first_latents(islice(iter(self.trainer.train_dataloader), num_batches))
        if not model.scale_is_known:
            model.measure_scale(latents, self._sum_over_ranks)
            _log.info("latent scale: %.5g, measured", float(model.scale_factor))
            return
        std = 1 / float(unit_variance_scale(latents, self._sum_over_ranks))
        level = logging.INFO if _FITTING_STD[0] <= std <= _FITTING_STD[1] else logging.WARNING
        _log.log(level, "scaled latents have standard deviation %.3g (diffusion expects about 1)", std)

    def _first_latents(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        first = 0
        for batch in batches:
            count = len(self.model.source(batch))
            draws = Draws.of_samples(self.device, self.numbers(first, count), MEASURE, self.seed)
            first += count * self.world_size
            yield self.model.latents(self.transfer_batch_to_device(batch, self.device, 0), draws.normal)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
