"""First stage: an autoencoder trained against a perceptual loss and a patch discriminator (section 3.1, appendix G).

Each batch is encoded and decoded once. The generator's loss, in which the discriminator is a constant, and the
discriminator's loss on the detached reconstruction share one backward pass; one Adam with two parameter groups then
steps both. Adam treats every parameter on its own and the generator's step does not change the discriminator, so this
equals two optimisers that step one after the other. But every parameter gets exactly one gradient per pass, which is
what distributed data parallelism asks for, accumulation and gradient scaling are Lightning's own, and `global_step`
counts batches, as the published `disc_start` does, not optimiser calls.

The state dict is flat as published: the autoencoder's own parts, loss.*, model_ema.*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ldm.aliases import Batch
from ldm.autoencoder.losses import AdversarialLoss
from ldm.autoencoder.regularizers import Info, VectorQuantizer
from ldm.bounds import Count, Fraction, NonNegative
from ldm.errors import UserError
from ldm.evaluation.image_metrics import psnr
from ldm.models.autoencoder import Autoencoder
from ldm.training.codebook import CodebookUpkeep, CodeCounts
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.module import TrainingModule
from ldm.training.optimization import MakeOptimizer, Multiplier, build_optimizer, scheduler, stepwise
from ldm.training.randomness import Draws, seed_from
from ldm.weights.adapters import LoRA

_RESIZE_MULTIPLE = 16
_BETAS = (0.5, 0.9)
_COUNTED = ("train", "val", "val_ema", "test", "test_ema")
_FULL_SIZE_STEPS = 5  # the first batches have the largest size, so that too little memory shows at once


class AutoencoderTraining(TrainingModule):
    """Train an autoencoder, and the discriminator where the loss has one.

    `ema_decay` None keeps no average; `lr_schedule` multiplies both learning rates per step, `generator_lr_factor` that
    of the autoencoder only; `learn_logvar` also trains the output variance of the loss; `resize_range` (low, high)
    resizes each batch to a random square size between them; `codebook` moves the codes of a VectorQuantizer otherwise
    than by gradients alone; `optimizer` is another one in place of Adam, see `Optimization`. `train`, `learning_rates`
    and `adapter` say what is trained of the autoencoder, and how fast, see `TrainingModule.choose`; a discriminator is
    always trained.
    """

    root_parts = ("model",)

    def __init__(
        self,
        model: Autoencoder,
        loss: nn.Module,
        ema_decay: Fraction | None = None,
        lr_schedule: Multiplier | None = None,
        betas: tuple[NonNegative, NonNegative] = _BETAS,
        generator_lr_factor: NonNegative = 1.0,
        learn_logvar: bool = False,
        resize_range: tuple[Count, Count] | None = None,
        image_key: str = "image",
        codebook: CodebookUpkeep | None = None,
        optimizer: MakeOptimizer | None = None,
        train: Sequence[str] | None = None,
        learning_rates: Mapping[str, NonNegative] | None = None,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__(learning_rate=4.5e-6)
        self.lr_schedule, self.betas, self.generator_lr_factor = lr_schedule, tuple(betas), generator_lr_factor
        self.learn_logvar, self.resize_range, self.image_key = learn_logvar, resize_range, image_key
        self.model = model
        self.loss = loss
        quantizer = model.quantize
        if codebook is not None and not isinstance(quantizer, VectorQuantizer):
            raise UserError(f"training.params.codebook: {type(quantizer).__name__} has no codebook; leave it out")
        self.codebook, self.optimizer = codebook, optimizer
        if optimizer is not None and self.betas != _BETAS:
            raise UserError("betas: is Adam's; give it to the optimizer, and leave it out beside it")
        self._counts: dict[str, CodeCounts] = {}
        if isinstance(quantizer, VectorQuantizer):
            self._counts = {name: CodeCounts(quantizer.n_e) for name in _COUNTED}
        self.choose(train, learning_rates, adapter)
        if codebook is not None and not self._codes.requires_grad:
            raise UserError("codebook: moves codes that train leaves out; add quantize.embedding.weight to it")
        if self.discriminator_parameters() and not self.model.last_layer.requires_grad:
            raise UserError(
                "train: leaves out decoder.conv_out.weight, by whose gradient a discriminator is weighted; add it, or "
                "set training.params.loss.params.discriminator=null"
            )
        self.model_ema = None
        if ema_decay is not None:
            self.model_ema = ExponentialMovingAverage(self, ema_decay, root="model.")

    @property
    def averaged(self) -> nn.Module:
        """Return this module: all that is trained is averaged."""
        return self

    # --- optimisation ----------------------------------------------------------------------------------------------

    def generator_parameters(self) -> list[nn.Parameter]:
        """List what gradients train of the autoencoder, with the output variance if it is learned."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.codebook is not None and self.codebook.replaces_gradient:
            parameters = [parameter for parameter in parameters if parameter is not self._codes]
        if self.learn_logvar:
            parameters.append(self.loss.logvar)
        return parameters

    @property
    def _codes(self) -> nn.Parameter:
        return self.model.quantize.embedding.weight

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """List the parameters of the discriminator; empty where the loss has none."""
        has_one = isinstance(self.loss, AdversarialLoss) and self.loss.discriminator is not None
        return list(self.loss.discriminator.parameters()) if has_one else []

    def setup(self, stage: str) -> None:
        """Freeze what is not trained, so that no gradient is kept or exchanged for it."""
        if stage != "fit":
            return
        if not isinstance(self.loss, AdversarialLoss):
            kind = type(self.loss).__name__
            raise UserError(f"training.params.loss: {kind} is no training loss; use KLLoss, VQLoss or a subclass")
        trained = {id(p) for p in self.generator_parameters() + self.discriminator_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build Adam, or the other optimiser, with groups for the autoencoder and for the discriminator."""
        groups = self.groups(self.generator_parameters(), self.learning_rate * self.generator_lr_factor)
        groups += self.groups(self.discriminator_parameters(), self.learning_rate)
        if self.optimizer is not None:
            optimizer = build_optimizer(self.optimizer, groups, self.learning_rate)
        else:
            optimizer = Adam(groups, lr=self.learning_rate, betas=self.betas, fused=self.may_fuse or None)
        return stepwise(optimizer, scheduler(optimizer, self.lr_schedule))

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """Return the autoencoder and the discriminator."""
        return [part for part in (self.generator_parameters(), self.discriminator_parameters()) if part]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the codebook."""
        super().optimizer_step(*args, **kwargs)
        if self.codebook is not None:
            self.codebook.update(self._codes, self.seed, self.global_step + 1)

    def networks(self) -> list[nn.Module]:
        """List the parts worth compiling."""
        of_loss = [getattr(self.loss, name, None) for name in ("perceptual_loss", "discriminator")]
        return [self.model.encoder, self.model.decoder, *(part for part in of_loss if part is not None)]

    # --- steps -----------------------------------------------------------------------------------------------------

    def _images(self, batch: Batch) -> Tensor:
        if self.image_key not in batch:
            raise UserError(f"batch: there is no '{self.image_key}'; the data set gives {', '.join(sorted(batch))}")
        return batch[self.image_key]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of both losses; each reaches only its own parameters."""
        x = self._resized(self._images(batch))  # (B, C, H, W)
        draws = self.keyed_draws(len(x))
        loss, logs, _ = self.losses(x, draws, "train")
        self.record(logs)
        return loss

    def losses(self, x: Tensor, draws: Draws, split: str, suffix: str = "") -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return generator plus discriminator loss for images x (B, C, H, W), their logs, and the reconstruction.

        Codes in use are counted for the logs of `split` + `suffix`.
        """
        reconstruction, regularization, info = self.model(x, draws.normal)
        self._observe(info, split + suffix)
        step, discriminator = self.global_step, self.discriminator_parameters()
        last_layer = self.model.last_layer
        with _constant(discriminator):
            loss, logs = self.loss.generator(x, reconstruction, regularization, step, last_layer, split=split)
        if discriminator:
            extra, more = self.loss.discriminator_loss(x, reconstruction.detach(), step, split=split)
            loss, logs = loss + extra, logs | more
        return loss, logs, reconstruction

    def _observe(self, info: Info, name: str) -> None:
        """Note which codes a batch chose, where there are codes."""
        if self._counts:
            self._counts[name].add(info["codes"])
        if self.codebook is not None and name == "train":
            self.codebook.observe(info["z"], info["codes"])

    def interval_logs(self) -> dict[str, Tensor]:
        """Return perplexity and usage of the codebook since the last time, over all ranks."""
        return self._counts["train"].logs(self.device) if self._counts else {}

    def _resized(self, x: Tensor) -> Tensor:
        """Resize a batch to a random multiple of 16 within the range; every rank takes the same size."""
        if self.resize_range is None:
            return x
        low, high = self.resize_range
        size = high
        if self.global_step >= _FULL_SIZE_STEPS:
            sizes = np.arange(low, high + 1, _RESIZE_MULTIPLE)
            size = int(sizes[seed_from(self.seed, self.global_step) % len(sizes)])
        return x if size == x.shape[-1] else F.interpolate(x, size=size, mode="bicubic")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log losses and PSNR with fixed draws, with the raw weights and with the averaged ones (suffix _ema)."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same of the data set `test`."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the means, and perplexity and usage of the codebook, over the whole data set."""
        split = "test" if self.trainer.testing else "val"
        for suffix in ("",) if self.model_ema is None else ("", "_ema"):
            if self._counts:
                logs = self._counts[split + suffix].logs(self.device)
                self.log_means({f"{split}/{name}{suffix}": value for name, value in logs.items()}, 1)
        super().on_validation_epoch_end()

    def _evaluate(self, batch: Batch, split: str) -> None:
        x = self._images(batch)
        numbers = self.evaluation_numbers(len(x))
        self._log_losses(x, self.evaluation_draws(numbers), split, "")
        if self.model_ema is not None:
            with self.ema_scope():
                self._log_losses(x, self.evaluation_draws(numbers), split, "_ema")

    def _log_losses(self, x: Tensor, draws: Draws, split: str, suffix: str) -> None:
        _, logs, reconstruction = self.losses(x, draws, split, suffix)
        logs["psnr"] = psnr(reconstruction, x).mean()
        self.log_means({f"{split}/{name}{suffix}": value for name, value in logs.items()}, len(x))

    # --- checkpoints: what belongs to the codebook is no weight -------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts of all ranks since the last log, and the state of the upkeep; every rank takes part."""
        super().on_save_checkpoint(checkpoint)
        if self._counts:
            upkeep = {} if self.codebook is None else self.codebook.state_dict(self.device)
            checkpoint["codebook"] = {"counts": self._counts["train"].total(self.device), "upkeep": upkeep}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with both, where the checkpoint has them."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("codebook")
        if self._counts and state is not None:
            self._counts["train"].start(state["counts"])
            if self.codebook is not None:
                self.codebook.load_state_dict(state["upkeep"])


@contextmanager
def _constant(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let no gradient reach these parameters from what is computed inside; those that pass through them go on."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
