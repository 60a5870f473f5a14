"""The training losses of the first stage: reconstruction, adversary, regulariser (arXiv 2112.10752, Eq. 25 and App. G).

The autoencoder minimises L_rec + L_reg - lambda D(x_rec), the discriminator D a hinge or logistic loss. With nll the
reconstruction term and W the weights of the decoder's last layer,
    lambda = weight * clamp(|d nll / dW| / (|d g / dW| + 1e-4), 0, max_weight),  g = -mean D(x_rec)
balances the two gradients (VQGAN, arXiv 2012.09841, Eq. 7). Losses are computed in float32 at least.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.regularizers import float32_or_wider, measure_perplexity
from ldm.bounds import Natural, NonNegative, Size
from ldm.distributed import world_size
from ldm.errors import UserError
from ldm.networks.synchronized import sum_over_ranks

Logs = dict[str, Tensor]


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return (mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the logistic loss (mean softplus(-real) + mean softplus(fake)) / 2."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def hinge_d_loss_with_exemplar_weights(logits_real: Tensor, logits_fake: Tensor, weights: Tensor) -> Tensor:
    """Return the hinge loss of (B, 1, h, w) logits, averaged over the batch with weights (B,)."""
    real = F.relu(1.0 - logits_real).mean(dim=(1, 2, 3))
    fake = F.relu(1.0 + logits_fake).mean(dim=(1, 2, 3))
    return 0.5 * ((weights * real).sum() + (weights * fake).sum()) / weights.sum()


_DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


@dataclass(frozen=True)
class Adversary:
    """Settings of the adversarial terms. UserError for an unknown loss.

    Args:
        loss: of the discriminator D.
        factor: multiplies the adversarial terms of autoencoder and D.
        weight: multiplies the adversarial term of the autoencoder.
        conditional: D also takes `cond` as channels.
        max_weight: bound of the balance lambda / weight.
        warmup: steps in which D is trained before disc_start, when the autoencoder's term begins (published: 0).
        ramp: steps from disc_start on over which the weight grows from weight / ramp to weight (0: at once).
        synchronized: compute the balance from gradients averaged over all ranks; else from those of each rank.
    """

    loss: Literal["hinge", "vanilla"] = "hinge"
    factor: NonNegative = 1.0
    weight: NonNegative = 1.0
    conditional: bool = False
    max_weight: NonNegative = 1e4
    warmup: Natural = 0
    ramp: Natural = 0
    synchronized: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "ramp"):
            if getattr(self, name) < 0:
                raise UserError(f"Adversary.{name}: {getattr(self, name)} steps; give 0 or more")
        if self.loss not in _DISCRIMINATOR_LOSSES:
            raise UserError(f"Adversary.loss: {self.loss!r}; allowed are {', '.join(_DISCRIMINATOR_LOSSES)}")


class AdversarialLoss(nn.Module):
    """What KLLoss and VQLoss share. UserError for an unknown pixel_loss.

    Args:
        disc_start: steps before the adversarial terms begin.
        perceptual_loss: (x, x_rec) -> (B, 1, 1, 1); None has no cost.
        discriminator: x -> logits; None has no cost.
        perceptual_weight: multiplies the perceptual loss.
        adversary: settings of the adversarial terms.
        pixel_loss: of an element, absolute or squared.
    """

    # The original VQ loss computes (and logs) the balance even if factor is 0.
    balances_without_factor = False

    def __init__(
        self,
        disc_start: Natural = 0,
        perceptual_loss: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        perceptual_weight: NonNegative = 1.0,
        adversary: Adversary | None = None,
        pixel_loss: Literal["l1", "l2"] = "l1",
    ) -> None:
        super().__init__()
        if pixel_loss not in ("l1", "l2"):
            raise UserError(f"{type(self).__name__}.pixel_loss: {pixel_loss!r}; allowed are l1, l2")
        self.disc_start = disc_start
        self.perceptual_loss = perceptual_loss
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversary = Adversary() if adversary is None else adversary
        self.pixel_loss = pixel_loss

    def generator(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        regularization: Tensor,
        step: int,
        last_layer: Tensor,
        cond: Tensor | None = None,
        weights: Tensor | None = None,
        indices: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, Logs]:
        """Return the autoencoder's loss (scalar) and logs.

        The adversarial term has weight 0 without gradients and outside of split "train". Its gradient also reaches the
        discriminator's parameters, which the caller must not step by it.

        Args:
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            regularization: the regulariser's loss.
            step: number of training steps so far.
            last_layer: W of the module's docstring.
            cond: further channels for a conditional discriminator.
            weights: factors of the pixels' terms, broadcast.
            indices: codes of this batch, for the logs of VQLoss.
            split: "train", or a name of validation data.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            x, x_rec = float32_or_wider(inputs), float32_or_wider(reconstructions)
            error, perceptual = self._errors(x, x_rec)
            nll = self.nll(error)
            regularization = float32_or_wider(regularization).mean()
            logs = {"nll_loss": nll.detach(), "rec_loss": error.detach().mean()}
            logs |= self.own_logs(perceptual.detach().mean(), regularization.detach(), indices)
            adversarial = nll.new_zeros(())
            if self.discriminator is not None:
                g_loss = -self._logits(x_rec, cond).mean()
                factor = self.disc_factor(step) * self._ramp(step)
                d_weight = nll.new_zeros(())
                is_on = self.adversary.factor > 0 or self.balances_without_factor
                if is_on and split == "train" and torch.is_grad_enabled() and x_rec.requires_grad:
                    nll, of_nll = self._with_gradient(nll, x_rec, is_last_use=weights is None)
                    g_loss, of_g = self._with_gradient(g_loss, x_rec)
                    d_weight = self._balance(of_nll, of_g, reconstructions, last_layer)
                adversarial = d_weight * factor * g_loss
                logs |= {"d_weight": d_weight, "disc_factor": nll.new_full((), factor), "g_loss": g_loss.detach()}
            loss = (nll if weights is None else self.nll(error, weights)) + self.regularization_weight * regularization
            loss = loss + adversarial
        return loss, {"total_loss": loss.detach(), **logs}

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, step: int, cond: Tensor | None = None, split: str = "train"
    ) -> tuple[Tensor, Logs]:
        """Return the discriminator's loss (scalar) and logs; no gradient reaches the images."""
        if self.discriminator is None:
            return inputs.new_zeros(()), {}
        with torch.autocast(inputs.device.type, enabled=False):
            real = self._logits(float32_or_wider(inputs.detach()), cond)
            fake = self._logits(float32_or_wider(reconstructions.detach()), cond)
            factor = self.disc_factor(step + self.adversary.warmup)
            loss = factor * _DISCRIMINATOR_LOSSES[self.adversary.loss](real, fake)
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return loss, {
            "disc_loss": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
            "disc_accuracy": accuracy,
        }

    def disc_factor(self, step: int) -> float:
        """Return the factor of the adversarial terms after `step` steps: 0 before disc_start."""
        return float(self.adversary.factor) if step >= self.disc_start else 0.0

    def _ramp(self, step: int) -> float:
        """Return the factor in (0, 1] by which `ramp` reduces the adversarial weight, for a step from disc_start on."""
        ramp = self.adversary.ramp
        return min(1.0, (step - self.disc_start + 1) / ramp) if ramp else 1.0

    def _errors(self, x: Tensor, x_rec: Tensor) -> tuple[Tensor, Tensor]:
        """Return errors (B, C, H, W), with the perceptual distance added, and that distance (B, 1, 1, 1)."""
        error = (x - x_rec).abs() if self.pixel_loss == "l1" else (x - x_rec).square()
        if self.perceptual_loss is None or self.perceptual_weight == 0:
            return error, error.new_zeros(())
        perceptual = self.perceptual_loss(x, x_rec)  # (B, 1, 1, 1)
        return error + self.perceptual_weight * perceptual, perceptual

    def _logits(self, x: Tensor, cond: Tensor | None) -> Tensor:
        if self.adversary.conditional is (cond is None):
            given = "no cond came with" if cond is None else "cond came with"
            raise UserError(f"Adversary.conditional: {self.adversary.conditional}, but {given} the images")
        return self.discriminator(x if cond is None else torch.cat([x, float32_or_wider(cond)], dim=1))

    def _with_gradient(self, term: Tensor, x_rec: Tensor, is_last_use: bool = True) -> tuple[Tensor, Tensor]:
        """Return a term whose gradients are known, and that by x_rec: LPIPS and D are gone back through only once."""
        inputs = [x_rec, *(parameter for parameter in self.parameters() if parameter.requires_grad)]
        gradients = torch.autograd.grad(term, inputs, retain_graph=not is_last_use, allow_unused=True)
        known = [(tensor, by) for tensor, by in zip(inputs, gradients, strict=True) if by is not None]
        return _Known.apply(term.detach(), [by for _, by in known], *(tensor for tensor, _ in known)), gradients[0]

    def _balance(self, of_nll: Tensor, of_g: Tensor, output: Tensor, last_layer: Tensor) -> Tensor:
        """Return lambda, given the gradients by the decoder's output in float32."""
        over_ranks = self.adversary.synchronized
        nll_norm = _gradient_norm(of_nll, output, last_layer, over_ranks)
        g_norm = _gradient_norm(of_g, output, last_layer, over_ranks)
        return (nll_norm / (g_norm + 1e-4)).clamp(0.0, self.adversary.max_weight) * self.adversary.weight


class _Known(torch.autograd.Function):
    """A value with gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)


class KLLoss(AdversarialLoss):
    """Loss of KL-regularised autoencoders: sums over an image's elements, averaged over the batch.

    nll = sum(error / exp(logvar) + logvar) / B, with a scalar parameter logvar; kl_weight multiplies the KL divergence
    (1e-6 in the released models). The other options are those of `AdversarialLoss`.
    """

    def __init__(
        self, disc_start: Natural = 0, logvar_init: float = 0.0, kl_weight: NonNegative = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(disc_start, **kwargs)
        self.regularization_weight = kl_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)))

    def nll(self, error: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the negative log likelihood per image of errors (B, C, H, W)."""
        terms = error / torch.exp(self.logvar) + self.logvar
        return (terms if weights is None else weights * terms).sum() / error.shape[0]

    def own_logs(self, perceptual: Tensor, regularization: Tensor, indices: Tensor | None) -> Logs:
        """Return the values that only this loss logs."""
        return {"logvar": self.logvar.detach(), "kl_loss": regularization}


class VQLoss(AdversarialLoss):
    """Loss of vector-quantised autoencoders: means over all elements.

    codebook_weight multiplies the quantiser's loss. With num_codes, perplexity and usage of the codebook in this batch
    are logged where its indices are given. The other options are those of `AdversarialLoss`.
    """

    balances_without_factor = True

    def __init__(
        self, disc_start: Natural = 0, codebook_weight: NonNegative = 1.0, num_codes: Size | None = None, **kwargs: Any
    ) -> None:
        super().__init__(disc_start, **kwargs)
        self.regularization_weight = codebook_weight
        self.num_codes = num_codes

    def nll(self, error: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean of errors (B, C, H, W)."""
        return (error if weights is None else weights * error).mean()

    def own_logs(self, perceptual: Tensor, regularization: Tensor, indices: Tensor | None) -> Logs:
        """Return the values that only this loss logs."""
        logs = {"quant_loss": regularization, "p_loss": perceptual}
        if self.num_codes is not None and indices is not None:
            logs["perplexity"], logs["cluster_usage"] = measure_perplexity(indices, self.num_codes)
        return logs


def _gradient_norm(gradient: Tensor, output: Tensor, last_layer: Tensor, over_ranks: bool) -> Tensor:
    """Return |d loss / d last_layer|, given d loss / d output in float32; over_ranks: of the mean."""
    norm = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
    # Unit length on the way back through the last layer, where half precision would lose 1e-7 and overflow at 1e5.
    unit = (gradient / norm).to(output.dtype)
    (gradient,) = torch.autograd.grad(output, last_layer, unit, retain_graph=True)
    gradient = float32_or_wider(gradient)
    return (sum_over_ranks(gradient * norm) / world_size()).norm() if over_ranks else gradient.norm() * norm
