"""Flow and EDM on a 2-D mixture whose optimal denoiser is known: the trained loss reaches the analytic one."""

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.cosine import Cosine
from ldm.diffusion.edm import EDM
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Flow, Preconditioned, Prediction, Velocity
from ldm.diffusion.process import Level, Process
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.diffusion.times import LogitNormal, LogNormal

MEANS = torch.tensor([[-0.6, 0.3], [0.5, 0.5], [0.1, -0.7]])
STD = 0.15
STEPS = 2000


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the mixture, as images of two channels and one pixel."""
    which = torch.randint(len(MEANS), (count,), generator=generator)
    points = MEANS[which] + STD * torch.randn(count, 2, generator=generator)
    return points[:, :, None, None]


def ideal(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return E[x_0 | x_t] and E[eps | x_t] of the mixture, by Bayes' rule."""
    x, alpha, sigma = x_t.flatten(1), level.alpha.flatten()[:, None], level.sigma.flatten()[:, None]
    variance = (alpha * STD) ** 2 + sigma**2
    offsets = x[:, None] - alpha[:, None] * MEANS  # (B, K, 2)
    weights = torch.softmax(-offsets.square().sum(2) / (2 * variance), dim=1)[:, :, None]
    x0 = (weights * (MEANS + (alpha * STD**2 / variance)[:, None] * offsets)).sum(1)
    eps = (weights * (sigma / variance)[:, None] * offsets).sum(1)
    return x0[:, :, None, None], eps[:, :, None, None]


class Points(nn.Module):
    """A small network on points and times."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.logspace(-3.5, -0.5, 16), requires_grad=False)
        self.layers = nn.Sequential(
            nn.Linear(34, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None].float() * self.frequencies
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1))[:, :, None, None]


def losses(
    network: nn.Module, process: Process, prediction: Prediction, objective: Objective, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the loss of the network and that of the ideal denoiser on `count` points."""
    generator = torch.Generator().manual_seed(seed)
    x0, u = mixture(count, generator), (torch.arange(count) + torch.rand(count, generator=generator)) / count
    eps, level = torch.randn(x0.shape, generator=generator), process.level(objective.times(u, process))
    x_t, target = level.diffuse(x0, eps), prediction.target(x0, eps, level)
    best = prediction.target(*ideal(x_t, level), level)
    return objective(network(*prediction.inputs(x_t, level)), target, level).loss, objective(best, target, level).loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "prediction", "times"),
    [
        (RectifiedFlow(), Flow(), LogitNormal()),
        (EDM(sigma_data=0.5), Preconditioned(0.5), LogNormal()),
        (Cosine(), Velocity(), None),
    ],
    ids=["flow", "edm", "cosine"],
)
def test_the_trained_loss_reaches_that_of_the_optimal_denoiser(
    process: Process, prediction: Prediction, times: object
) -> None:
    torch.manual_seed(0)
    network, objective = Points(), Objective(times=times).bind(process, prediction)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        loss, _ = losses(network, process, prediction, objective, 512, seed=step + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        trained, best = losses(network, process, prediction, objective, 50_000, seed=0)
    assert float(best) * 0.999 < float(trained) < float(best) * 1.02
