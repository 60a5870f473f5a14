"""Training of the second stage: a diffusion model in the latent space of a frozen autoencoder (equations 2 and 3).

The module holds a `LatentDiffusion`, an objective and an average of the network's weights; it adds draws that belong to
samples, the optimiser, evaluation and logs. Its state dict is that of the model with `model_ema` and, if learned,
`logvar`, as published, and the perceptron of an alignment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ldm.aliases import Batch
from ldm.bounds import Fraction, NonNegative
from ldm.diffusion.objective import Objective, Terms
from ldm.diffusion.times import golden_ratio_uniforms
from ldm.errors import UserError, shown
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.latent_scale import unit_variance_scale
from ldm.networks.transformer import TransformerEncoder, TransformerLayers
from ldm.training.alignment import Alignment
from ldm.training.distillation import ConsistencyDistillation
from ldm.training.ema import ExponentialMovingAverage, PowerFunctionAverage
from ldm.training.meters import LossByTimestep
from ldm.training.module import DoesNotFit, TrainingModule
from ldm.training.optimization import Optimization, stepwise
from ldm.training.randomness import MEASURE, Draws
from ldm.transfer import sent
from ldm.weights.adapters import LoRA

_log = logging.getLogger(__name__)
_FITTING_STD = (0.7, 1.4)


def _check_names(averages: Iterable[object]) -> None:
    """Raise UserError for what cannot name an average, in a checkpoint or where weights are chosen."""
    taken, container = ("ema", "raw"), nn.ModuleDict()
    for name in averages:
        if not isinstance(name, str) or not name or "." in name or name in taken or hasattr(container, name):
            remedy = "use a word without dots that has no other meaning, such as short"
            raise UserError(f"averages: {shown(str(name)) or 'an empty text'} cannot be a name; {remedy}")


def _is_text_network(part: nn.Module) -> bool:
    return isinstance(part, TransformerLayers) or type(part).__name__ == "CLIPEncoder"  # of transformers


class DiffusionTraining(TrainingModule):
    """Train a latent diffusion model; its first stage is frozen and stays out of optimiser and average."""

    root_parts = ("model", "objective")

    def __init__(
        self,
        model: LatentDiffusion,
        objective: Objective | None = None,
        ema_decay: Fraction | None = 0.9999,
        averages: Mapping[str, float] | None = None,
        optimization: Optimization | None = None,
        train: Sequence[str] | None = None,
        learning_rates: Mapping[str, NonNegative] | None = None,
        adapter: LoRA | None = None,
        alignment: Alignment | None = None,
        distillation: ConsistencyDistillation | None = None,
    ) -> None:
        """Take the model to train. UserError for an objective that its process cannot have.

        Args:
            model: The model.
            objective: Loss and density of training times (default: mean squared error, uniform).
            ema_decay: Decay of the average of the network's weights; None keeps no average.
            averages: Further averages by name, each with its relative length (see `PowerFunctionAverage`). The names go
                into those of weights: words without dots, other than ema and raw.
            optimization: Optimiser and schedule (default: AdamW).
            train, learning_rates, adapter: What is trained, and how fast, see `TrainingModule.choose`.
            alignment: Term that aligns hidden states of the network with a teacher's features of the images.
            distillation: What is learned in place of the objective: to do the walk of a teacher in a few steps.
        """
        super().__init__(learning_rate=1e-4)
        _check_names(averages or {})
        self.model = model
        self.objective = (objective or Objective()).bind(model.process, model.prediction)
        if self.objective.variance_weight is not None and not model.learns_variance:
            raise UserError(
                "objective: variance_weight has no effect on a network without channels for it; leave it out, or "
                f"set out_channels to {2 * model.first_stage_model.latent_channels}"
            )
        self.distillation = distillation
        if distillation is not None:
            for name, part in (("objective", objective), ("alignment", alignment)):
                if part is not None:
                    raise UserError(f"{name}: has no part in a distillation; leave one of them out")
            distillation.begin(model)
        self.alignment = None if alignment is None else alignment.bind(model.model.diffusion_model)
        self.optimization = optimization or Optimization()
        self.gradient_clip = self.optimization.gradient_clip
        self.choose(train, learning_rates, adapter)
        if distillation is not None:
            self._has_frozen_parts = True
            self.train()
        self.model_ema = None if ema_decay is None else ExponentialMovingAverage(model.model, ema_decay)
        kept = {name: PowerFunctionAverage(model.model, sigma_rel) for name, sigma_rel in (averages or {}).items()}
        self.averages = nn.ModuleDict(kept)
        self._quartiles = LossByTimestep()

    @property
    def image_key(self) -> str:
        """Name of the images in a batch."""
        return self.model.image_key

    @property
    def averaged(self) -> nn.Module:
        """The conditional network, the only part that is averaged."""
        return self.model.model

    def all_averages(self) -> list[ExponentialMovingAverage]:
        """List `model_ema` and the averages beside it."""
        return [*super().all_averages(), *self.averages.values()]

    # --- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss; every draw is a function of (seed, number of the sample)."""
        model, draws = self.model, self.keyed_draws(len(self.model.source(batch)))
        z = model.latents(batch, draws.normal)  # (B, c, h, w)
        if self.distillation is not None:
            u, eps = draws.uniform((len(z),)), draws.normal(z.shape)
            terms = self.distillation(model, z, model.condition(batch), u, eps)
            self.record(self.logs(terms))
            return terms.loss
        drop = None if model.cond_stage_model is None else model.cond_stage_model.draw_drop(len(z), draws.uniform)
        t = sent(self.objective.draw_times(draws, len(z), model.process), self.device)
        eps = self.objective.draw_noise(draws, z.shape)
        hidden = [] if self.alignment is not None and self.alignment.is_on(self.global_step) else None
        terms = model.loss(z, model.condition(batch, drop), t, eps, self.objective, hidden)
        loss, logs = terms.loss, self.logs(terms)
        if hidden is not None:
            aligned = self.alignment(hidden, self._images(batch))
            loss = loss + self.alignment.weight * aligned
            logs |= {"loss": loss.detach(), "loss_alignment": aligned.detach()}
        elif self.alignment is not None:
            loss = loss + self.alignment.idle()
        self.record(logs)
        return loss

    def _images(self, batch: Batch) -> Tensor:
        if self.image_key not in batch:
            raise UserError(f"alignment: the batch has no images ('{self.image_key}'), it has {', '.join(batch)}")
        return batch[self.image_key]

    def logs(self, terms: Terms) -> dict[str, Tensor]:
        """Return what is logged of a loss, under the published names without "train/" or "val/"."""
        logs = {"loss_simple": terms.simple.mean(), "loss": terms.loss}
        if terms.vlb is not None:
            logs["loss_vlb"] = terms.vlb
        if terms.variance is not None:
            logs["loss_variance"] = terms.variance
        if self.objective.learn_logvar or self.objective.uncertainty is not None:
            logs["loss_gamma"] = terms.gamma
        if self.objective.learn_logvar:
            logs["logvar"] = self.objective.logvar.mean()
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
        eps, conditioning = draws.normal(z.shape), model.condition(batch)

        def terms() -> Terms:
            if self.distillation is not None:
                return self.distillation(model, z, conditioning, u, eps)
            t = self.objective.times(u.float(), model.process).to(self.device)
            return model.loss(z, conditioning, t, eps, self.objective)

        self._log_terms(terms(), u, split, "")
        if self.model_ema is not None:
            with self.ema_scope():
                self._log_terms(terms(), u, split, "_ema")

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

    def setup(self, stage: str) -> None:
        """Freeze the published text encoder's unused output layer, for which no gradient would ever arrive."""
        if self.model.cond_stage_model is not None:
            for module in self.model.cond_stage_model.modules():
                if isinstance(module, TransformerEncoder):
                    module.to_logits.requires_grad_(False)

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Return what is trained: the network, the conditioner as far as it is trainable, what the loss learns."""
        parts = (self.model.model, self.model.cond_stage_model, self.objective, self.alignment)
        parameters = [parameter for part in parts if part is not None for parameter in part.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def networks(self) -> list[nn.Module]:
        """Return the parts worth compiling: the network, the encoder of the first stage, transformers of texts."""
        encoder, conditioner = getattr(self.model.first_stage_model, "encoder", None), self.model.cond_stage_model
        encoders = [] if encoder is None else [encoder]
        texts = [] if conditioner is None else [part for part in conditioner.modules() if _is_text_network(part)]
        return [self.model.model.diffusion_model, *encoders, *texts]

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """Return all that is trained as one part."""
        return [self.optimized_parameters()]

    def configure_optimizers(self) -> dict[str, Any]:
        """Build optimiser and schedule; AdamW is fused unless a gradient scaler has to look at the gradients first."""
        groups = self.groups(self.optimized_parameters(), self.learning_rate)
        optimizer = self.optimization.build(groups, self.learning_rate, fused=self.may_fuse)
        return stepwise(optimizer, self.optimization.scheduler(optimizer))

    @property
    def teachers(self) -> dict[str, Any]:
        """Frozen networks outside of this module on which the loss depends, by the parameter that names them."""
        aligned = None if self.alignment is None else self.alignment.teacher
        found = {"alignment": aligned, "distillation": self.distillation}
        return {name: part for name, part in found.items() if part is not None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which teachers the run has, as hashes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["teachers"] = {name: teacher.hash for name, teacher in self.teachers.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of a run with another teacher or process, whose tables would replace those of the config."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("teachers", {})
        for name, teacher in self.teachers.items():
            if saved.get(name, teacher.hash) != teacher.hash:
                raise DoesNotFit(f"training.params.{name}.params.teacher: has other weights than that of the run")
        for name, table in self.model.process.buffers().items():
            saved = checkpoint["state_dict"].get(name)
            if saved is not None and saved.shape == table.shape and not torch.allclose(saved, table.cpu(), rtol=1e-4):
                raise DoesNotFit(f"model.params.process: the run has another process ({name} differs)")

    # --- the latent scale ------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Read teachers; measure the latent scale of a new run before anything uses it, of a given one log its fit."""
        model = self.model
        for teacher in self.teachers.values():
            _log.info("teacher: weights %s", teacher.to(self.device).hash[:8])
        if self.trainer.ckpt_path is not None or isinstance(model.first_stage_model, IdentityAutoencoder):
            return
        self.trainer.fit_loop.setup_data()
        # In global batches: another number of ranks, or accumulation, measures the same samples.
        num_batches = model.latent_scale.num_batches * self.trainer.accumulate_grad_batches
        latents = self._first_latents(islice(iter(self.trainer.train_dataloader), num_batches))
        if not model.scale_is_known:
            model.measure_scale(latents, self._sum_over_ranks)
            measured = "of each channel" if model.latent_scale.has_channels else f"{float(model.scale_factor):.5g}"
            _log.info("latent scale: %s, measured", measured)
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
