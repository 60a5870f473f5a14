"""Consistency distillation: exact students of Gaussians, what they learn, and teachers from which they cannot."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from fitting import fit, fit_whole_and_in_two, largest_difference
from tiny_runs import fails, script
from torch import nn

from ldm.cli.train import main
from ldm.conditioning.labels import ClassConditioner
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.objective import Objective, PseudoHuber
from ldm.diffusion.prediction import Epsilon, Flow, Preconditioned, Sample, Velocity
from ldm.diffusion.process import float64_levels
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_model
from ldm.sampling.base import last
from ldm.sampling.consistency import Consistency
from ldm.sampling.ddim import DDIM
from ldm.training.alignment import Alignment
from ldm.training.distillation import ConsistencyDistillation, consistent
from ldm.training.stages import student_overrides

STD = 0.7  # of the data in closed form
KINDS = {
    "linear": (DiscreteVP.linear(1000, 0.0015, 0.0195), Epsilon()),
    "cosine": (DiscreteVP.cosine(1000), Velocity()),
    "x0": (DiscreteVP.cosine(1000), Sample()),
    "flow": (RectifiedFlow(), Flow()),
    "edm": (EDM(), Preconditioned(STD)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Linear(nn.Module):
    """A network whose x_0 is a factor times x_t, one for each time of a walk; it makes of that what it predicts."""

    in_channels = out_channels = size_multiple = 1
    context_dim = num_classes = None
    blocks = ()

    def __init__(self, kind: str, times: torch.Tensor, factors: list[float]) -> None:
        super().__init__()
        self.process, self.prediction = KINDS[kind]
        self.times, self.factors = times[:-1].float(), torch.tensor(factors)

    def forward(self, x, t, context=None, y=None):
        told = self.process.level(self.times).time
        index = (told[None] - t[:, None]).abs().argmin(1)
        level = self.process.level(self.times[index])
        x_t = x / self.prediction.inputs(torch.ones_like(x), level)[0]
        x0 = self.factors[index, None, None, None] * x_t
        return self.prediction.target(x0, (x_t - level.alpha * x0) / level.sigma, level)


def model_of(kind: str, network: nn.Module) -> LatentDiffusion:
    process, prediction = KINDS[kind]
    return LatentDiffusion(network, IdentityAutoencoder(1), process, prediction=prediction)


def closed_forms(kind: str, intervals: int) -> tuple[ConsistencyDistillation, LatentDiffusion, LatentDiffusion]:
    """Return a distillation from the mean of N(0, STD^2), with students of its walk and of the exact flow."""
    probe = ConsistencyDistillation(model_of(kind, nn.Identity()), intervals=intervals)
    probe.teacher = probe.source
    times = probe.times
    alphas, sigmas = float64_levels(KINDS[kind][0], times)
    means = [a * STD**2 / ((a * STD) ** 2 + s**2) for a, s in zip(alphas, sigmas, strict=True)][:-1]
    walk = [1.0]
    for i in reversed(range(len(means))):  # x' = alpha' x0 + sigma' eps, times what is left of the walk
        eps = (1 - alphas[i] * means[i]) / sigmas[i]
        walk.insert(0, (alphas[i + 1] * means[i] + sigmas[i + 1] * eps) * walk[0])
    flow = [STD / ((a * STD) ** 2 + s**2) ** 0.5 for a, s in zip(alphas, sigmas, strict=True)][:-1]
    teacher, *students = (model_of(kind, Linear(kind, times, factors)) for factors in (means, walk[:-1], flow))
    distillation = ConsistencyDistillation(teacher, intervals=intervals, loss="l2")
    for student in students:
        distillation.begin(student)
    return distillation, *students


def loss_of(distillation: ConsistencyDistillation, student: LatentDiffusion) -> float:
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 256, 1, 2, 2, generator=generator)
    u = (torch.arange(256) + 0.5) / 256
    return distillation(student, STD * z, None, u, eps).loss.item()


@each_kind
def test_a_student_that_is_exact_has_no_loss_and_draws_the_data_in_one_step(kind):
    distillation, walk, flow = closed_forms(kind, 16)
    assert loss_of(distillation, walk) < 1e-9
    finer, _, flow_of_finer = closed_forms(kind, 64)
    assert loss_of(finer, flow_of_finer) < loss_of(distillation, flow) / 6  # the walk tends to the flow
    assert loss_of(distillation, distillation.teacher) > 4 * loss_of(distillation, flow)  # means are no ends of it
    process = KINDS[kind][0]
    noise = process.prior_std * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    (step,) = Consistency(1)(flow.denoiser(), noise, process)
    alpha = process.level(torch.tensor([process.noisiest])).alpha
    exact = STD / ((alpha * STD) ** 2 + process.prior_std**2).sqrt() * noise
    torch.testing.assert_close(step.x, exact, atol=1e-4, rtol=1e-4)


@each_kind
def test_clean_data_are_the_end_of_their_own_flow(kind):
    _, walk, _ = closed_forms(kind, 8)
    process = walk.process
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([process.clean, process.noisiest, process.clean])
    ends = consistent(walk.denoiser(), process, x, t)
    assert torch.equal(ends[::2], x[::2]) and not torch.equal(ends[1], x[1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "x0"])
def test_predictions_have_the_boundary_in_themselves(kind):
    """c_skip = 1 and c_out = 0 at clean data, whatever the network says."""
    process, prediction = KINDS[kind]
    x, output = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    level = process.level(torch.full((3,), process.clean, dtype=torch.float64))
    torch.testing.assert_close(prediction.denoised(output, x, level).x0, x, atol=1e-6, rtol=1e-6)


def test_the_target_is_behind_one_guided_step_of_the_teacher():
    teacher = tiny.class_diffusion().model.eval()
    distillation = ConsistencyDistillation(teacher, guidance=2.5, intervals=5, loss=PseudoHuber(0.1))
    student = tiny.class_diffusion(seed=1).model
    distillation.begin(student)
    assert largest_difference(student.state_dict(), teacher.state_dict()) == 0.0
    with torch.no_grad():
        student.model.diffusion_model.out[-1].weight.mul_(1.1)
    z, eps = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = teacher.condition({"class_label": torch.tensor([0, 2])})
    terms = distillation(student, z, condition, torch.tensor([0.5, 0.05]), eps)
    process = teacher.process
    assert distillation.times.tolist() == [19, 15, 11, 7, 3, -1]
    (t, s), denoise = (torch.tensor(ends) for ends in ([11.0, 3.0], [7.0, -1.0])), student.denoiser(condition)
    x_t = process.level(t).diffuse(z, eps)
    x_s = process.level(s).diffuse(*teacher.denoiser(condition, 2.5)(x_t, t))
    target = torch.stack([denoise(x_s, torch.tensor([7.0, 3.0])).x0[0], x_s[1]])
    error = ((denoise(x_t, t).x0 - target).square() + 0.01).sqrt() - 0.1
    torch.testing.assert_close(terms.simple, error.mean((1, 2, 3)))
    assert terms.loss.item() == pytest.approx(error.mean().item(), rel=1e-5)


def student_of(teacher: LatentDiffusion | str, **options) -> tiny.DiffusionTraining:
    return tiny.class_diffusion(seed=2, distillation=ConsistencyDistillation(teacher, 2.0, intervals=5, **options))


def test_training_changes_the_network_alone(tmp_path: Path):
    training = student_of(tiny.class_diffusion().model.eval(), loss="l2")
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    fit(training, tmp_path, 2)
    changed = {name for name, value in training.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.") for name in changed)
    assert not training.model.cond_stage_model.training and training.model.model.training
    assert not any(name.startswith("distillation") for name in training.state_dict())


def test_a_student_goes_on_to_the_bit_and_only_with_its_teacher(tmp_path: Path):
    teacher = tiny.class_diffusion().model.eval()
    whole, first, second = (student_of(teacher) for _ in range(3))
    goes_on = fit_whole_and_in_two(whole, first, second, tmp_path)
    assert largest_difference(whole.state_dict(), second.state_dict()) == 0.0
    with pytest.raises(UserError, match=r"training\.params\.distillation.*other weights"):
        fit(student_of(tiny.class_diffusion(seed=5).model), tmp_path, 4, **goes_on)


def test_what_cannot_be_distilled_is_refused():
    teacher = tiny.class_diffusion().model.eval()
    for given in ({"objective": Objective()}, {"alignment": Alignment(object(), 1)}):
        with pytest.raises(UserError, match=f"{next(iter(given))}: has no part in a distillation"):
            tiny.class_diffusion(distillation=ConsistencyDistillation(teacher), **given)
    with pytest.raises(UserError, match="intervals: is 21, but the process has 20 steps"):
        tiny.class_diffusion(distillation=ConsistencyDistillation(teacher, intervals=21))
    with pytest.raises(UserError, match="teacher: predicts Epsilon, the model Velocity"):
        tiny.class_diffusion(distillation=ConsistencyDistillation(teacher, intervals=5), prediction=Velocity())
    with pytest.raises(UserError, match="does not fit LatentDiffusion"):
        unconditional = tiny.latent_diffusion(tiny.unet(), tiny.autoencoder()).model
        tiny.class_diffusion(distillation=ConsistencyDistillation(unconditional, intervals=5))


def test_guidance_needs_a_null_condition():
    unconditional = tiny.latent_diffusion(tiny.unet(), tiny.autoencoder()).model
    with pytest.raises(UserError, match="guidance: is 2, but the model has no condition; set it to 1"):
        ConsistencyDistillation(unconditional, 2.0, intervals=5).begin(unconditional)
    ConsistencyDistillation(unconditional, intervals=5).begin(unconditional)

    def without_null() -> LatentDiffusion:
        conditioner = ClassConditioner(4, tiny.WIDTH)
        return tiny.latent_diffusion(tiny.unet(context_dim=tiny.WIDTH), tiny.autoencoder(), conditioner).model

    with pytest.raises(UserError, match="without null_label"):
        ConsistencyDistillation(without_null(), 2.0, intervals=5).begin(without_null())
    ConsistencyDistillation(without_null(), intervals=5).begin(without_null())


# ------------------------------------------------------------------------------------------------------ as users do it


def teacher_config(drop_rate: float = 0.3) -> dict:
    parts = {"num_classes": 4, "embed_dim": tiny.WIDTH, "null_label": 3, "drop_rate": drop_rate}
    conditioner = tiny.node("conditioning.labels.ClassConditioner", **parts)
    network = tiny.unet_config(context_dim=tiny.WIDTH)
    objective = tiny.node("diffusion.objective.Objective", loss="l1")
    training = tiny.latent_diffusion_config(network, tiny.autoencoder_config(), conditioner, objective=objective)
    noise = {"target": "fitting.Noise", "params": {"length": 4}}
    config = tiny.run_config(training, noise, noise, lightning={"trainer": {"max_steps": 2}})
    config["training"]["allow_untrained_first_stage"] = True
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher_config()))
    (folder / "undropped.yaml").write_text(yaml.safe_dump(teacher_config(drop_rate=0.0)))
    for name in ("teacher", "undropped"):
        words = ["--base", str(folder / f"{name}.yaml"), "-t", "--logdir", str(folder / name), "--allow", "fitting"]
        assert main(words) == 0
    return folder


def run_in(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_a_student_is_a_run_like_others(teacher: Path, tmp_path: Path, capsys, caplog):
    source = str(run_in(teacher / "teacher"))
    words = ["--guidance", "2", "--intervals", "5", "-l", str(tmp_path / "logs"), "--allow", "fitting"]
    script("distill").main(["--teacher", source, *words, "lightning.trainer.max_steps=3"])
    student = run_in(tmp_path / "logs")
    config = yaml.safe_load((student / "configs" / "config.yaml").read_text())
    params = {"teacher": source, "guidance": 2.0, "intervals": 5}
    assert config["training"]["params"]["distillation"]["params"] == params
    assert config["training"]["params"]["objective"] is None and config["model"]["checkpoint"] == source
    assert "python main.py --base" in caplog.text
    loaded = load_model(student)
    images = loaded.model.sample([0, 1, 2], sampler="consistency", steps=2)
    assert images.shape == (3, 3, 8, 8) and images.isfinite().all()
    header = (student / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header and "val/loss_simple_ema" in header


@pytest.mark.slow
def test_a_student_goes_on_and_its_cost_is_not_made_up(teacher: Path, tmp_path: Path, capsys):
    words = ["--intervals", "5", "-l", str(tmp_path / "logs"), "--allow", "fitting", "lightning.trainer.max_steps=1"]
    script("distill").main(["--teacher", str(run_in(teacher / "teacher")), *words])
    student = run_in(tmp_path / "logs")
    assert main(["-r", str(student), "-t", "--max_steps", "4", "--allow", "fitting"]) == 0
    assert main(["-r", str(student), "--dry-run", "--allow", "fitting", "--card", "1"]) == 0
    assert "the teacher of training.params.distillation is read at the first step" in capsys.readouterr().out


def test_mistakes_are_one_line_and_leave_nothing(teacher: Path, tmp_path: Path, capsys):
    distill, undropped = script("distill").main, run_in(teacher / "undropped")
    logs = ["-l", tmp_path / "logs", "--intervals", "5", "--allow", "fitting"]
    line = fails(capsys, distill, "--teacher", undropped, "--guidance", "2", *logs)
    assert "training: guidance: is 2" in line and "never dropped its condition" in line and len(line) <= 310
    assert "no configs/config.yaml" in fails(capsys, distill, "--teacher", tmp_path, *logs)
    logs[logs.index("5")] = "0"
    line = fails(capsys, distill, "--teacher", run_in(teacher / "teacher"), *logs)
    assert "training.params.distillation.params.intervals" in line
    assert not (tmp_path / "logs").exists()


def test_what_a_student_does_not_take_from_the_config_of_its_teacher():
    node = {"target": "x", "checkpoint": "gone.ckpt"}
    config = {
        "model": {"target": "y", "params": {"autoencoder": node}},
        "training": {"target": "z", "checkpoint": "gone", "params": {"objective": node, "ema_decay": 0.9, "train": []}},
        "lightning": {"callbacks": {"image_logger": None}},
    }  # fmt: skip
    words = student_overrides(config, "logs/RUN", 3.0, 50)
    keys = [word.partition("=")[0] for word in words]
    assert {"model.params.autoencoder.checkpoint=null", "training.checkpoint=null"} <= set(words)
    assert {"training.params.objective=null", "training.params.train=null"} <= set(words)
    assert "training.params.ema_decay" not in keys and not any("image_logger" in key for key in keys)
    assert keys.index("model.checkpoint") > keys.index("model.params.autoencoder.checkpoint")


@pytest.mark.parametrize("name", ["learning_rate", "base_learning_rate"])
def test_a_student_learns_at_a_twentieth_of_its_teacher_s_rate_and_clips_its_gradients(name):
    def of_student(**optimization):
        params = {"optimization": {"target": "ldm.training.optimization.Optimization", "params": optimization}}
        config = {"model": {}, "training": {name: 1e-3, "params": params if optimization else {}}}
        return dict(word.split("=", 1) for word in student_overrides(config, "logs/RUN", 3.0, 50))

    assert float(of_student()[f"training.{name}"]) == pytest.approx(5e-5)
    node = yaml.safe_load(of_student(eps=1.0, gradient_clip=None)["training.params.optimization"])
    assert node["params"] == {"eps": 1.0, "gradient_clip": 1.0}
    assert yaml.safe_load(of_student()["training.params.optimization"])["params"] == {"gradient_clip": 1.0}
    assert "training.params.optimization" not in of_student(gradient_clip=0.5)


# ------------------------------------------------------------------------------------------------------------ few steps


class Points(nn.Module):
    """A small network on points of the plane, as images of two channels and one pixel."""

    in_channels, out_channels, size_multiple, context_dim, num_classes = 2, 2, 1, None, None

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-3.5, -0.5, 16))
        self.blocks = nn.ModuleList([nn.Linear(34, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.last = nn.Linear(width, 2)

    def forward(self, x, t, context=None, y=None):
        angles = t[:, None] * self.frequencies
        h = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        for block in self.blocks:
            h = nn.functional.silu(block(h))
        return self.last(h)[:, :, None, None]


def mixture(count: int, generator: torch.Generator) -> torch.Tensor:
    means = torch.tensor([[-0.6, 0.3], [0.5, 0.5], [0.1, -0.7]])
    which = torch.randint(3, (count,), generator=generator)
    return (means[which] + 0.15 * torch.randn(count, 2, generator=generator))[:, :, None, None]


@pytest.mark.slow
def test_a_student_is_nearer_to_the_end_of_the_walk_in_one_step_than_its_teacher_in_two():
    process, objective, steps = RectifiedFlow(), Objective(), 1000
    torch.manual_seed(0)
    teacher, student = (LatentDiffusion(Points(), IdentityAutoencoder(2), process, prediction=Flow()) for _ in range(2))
    objective.bind(process, Flow())
    distillation = ConsistencyDistillation(teacher, intervals=16, loss="l2")
    generator = torch.Generator().manual_seed(0)
    fixed = (mixture(2000, generator), None, torch.rand(2000, generator=generator), torch.randn(2000, 2, 1, 1))
    for model in (teacher, student):
        if model is student:
            distillation.begin(student)
            inconsistent = distillation(student, *fixed).loss.item()
        optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            z, u = mixture(512, generator), torch.rand(512, generator=generator)
            eps = torch.randn(z.shape, generator=generator)
            if model is student:
                loss = distillation(student, z, None, u, eps).loss
            else:
                loss = teacher.loss(z, None, process.from_uniform(u), eps, objective).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    noise = torch.randn(2000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        end = last(DDIM(16)(teacher.denoiser(), noise, process)).x
        short = [last(DDIM(count)(teacher.denoiser(), noise, process)).x for count in (1, 2)]
        one = last(Consistency(1)(student.denoiser(), noise, process)).x
    distances = [(x - end).square().sum(1).mean().sqrt().item() for x in (*short, one)]
    assert distillation(student, *fixed).loss < inconsistent / 2
    assert distances[2] < 0.75 * distances[1] < distances[0], distances
