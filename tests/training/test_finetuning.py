"""What is trained, at which rate, and from which weights: patterns, optimisers, adapters in a run, what starts anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from breakage.processes import write_config
from fitting import fit, largest_difference
from prove_finetune import is_ring, ring
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer, SparseAdam

from ldm.cli.train import main
from ldm.config import instantiate
from ldm.config.check import validate
from ldm.errors import ConfigError, UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.saving import export_run
from ldm.toy.shapes import Shapes
from ldm.training.codebook import CodebookUpkeep
from ldm.training.module import TrainingModule
from ldm.training.optimization import Optimization, build_optimizer
from ldm.weights import files as storage
from ldm.weights.adapters import DoRA, LoRA, is_of_adapter
from ldm.weights.load import choose, load_into

BLOCKS = ["*.in_layers.2", "*.emb_layers.1", "*.out.2"]


def lively(seed: int = 3) -> TrainingModule:
    """Return the training of a model without layers of zeros, through which no gradient would pass."""
    module = tiny.class_diffusion(seed)
    for parameter in module.optimized_parameters():
        nn.init.normal_(parameter.detach(), std=0.1)
    return module


def trained(module: TrainingModule) -> set[str]:
    return {module.published_name(name) for name, value in module.named_parameters() if value.requires_grad}


# -------------------------------------------------------------------------------------------------------- by patterns


STAGES = {  # a training with these options: what is trained of the model
    "decoder": (tiny.autoencoder_training, ["decoder.*"], lambda name: name.startswith("decoder.")),
    "two": (tiny.class_diffusion, ["*.emb_layers.*", "cond_*"], lambda name: ".emb_" in name or "cond_" in name),
    "one": (tiny.class_diffusion, ["model.diffusion_model.out.2.bias"], lambda name: name.endswith(".out.2.bias")),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES)
def test_only_what_patterns_name_changes_is_averaged_and_has_a_state(case: str, tmp_path: Path) -> None:
    build, patterns, is_chosen = STAGES[case]
    module = build(train=patterns, ema_decay=0.5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    names = trained(module)
    assert names and all(is_chosen(name) or name.startswith("loss.") for name in names)
    trainer = fit(module, tmp_path, steps=2)
    held = {parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert set(module.named(held)) == {name for name in names if name != "loss.logvar"}
    for name, value in module.state_dict().items():
        if not name.startswith("model_ema."):
            assert name in names or torch.equal(value, before[name]) or "running" in name or "num_batches" in name, name
        elif value.ndim:
            assert any(name.endswith(each.removeprefix("model.").replace(".", "")) for each in names), name
    for part in module.model.modules():
        parameters = list(part.parameters())
        assert not part.training or not parameters or any(parameter.requires_grad for parameter in parameters)


def test_factors_make_groups_and_the_last_pattern_decides(tmp_path: Path) -> None:
    rates = {"model.*": 0.1, "*.out.2.*": 3.0, "*.emb_layers.*": 0.1}
    module = tiny.class_diffusion(learning_rates=rates)
    module.learning_rate = 1e-2
    groups = fit(module, tmp_path, steps=1).optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [1e-2, pytest.approx(1e-3), pytest.approx(3e-2)]
    assert {name.rpartition(".")[0] for name in module.named(groups[2]["params"])} == {"model.diffusion_model.out.2"}
    assert all(name.startswith("cond_stage_model") for name in module.named(groups[0]["params"]))
    first_stage = tiny.autoencoder_training(learning_rates={"loss.*": 0.5, "encoder.*": 0.0}, generator_lr_factor=2.0)
    groups = fit(first_stage, tmp_path, steps=1).optimizers[0].param_groups
    assert [round(group["lr"] / first_stage.learning_rate, 6) for group in groups] == [2.0, 0.0, 0.5]


def test_gradients_are_clipped_over_all_groups_together(tmp_path: Path) -> None:
    module = tiny.class_diffusion(learning_rates={"*.emb_layers.*": 0.1})
    module.backward(sum(parameter.square().sum() for parameter in module.optimized_parameters()))
    module.configure_gradient_clipping(None, 1.0)
    norm = torch.stack([parameter.grad.norm() for parameter in module.optimized_parameters()]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


REFUSED = {  # options of a training: words of the message
    "no such": (tiny.class_diffusion, {"train": ["*.emb_layer.*"]}, r"train: '.*emb_layer\.\*'.*\*\.emb_layers\.\*\?"),
    "frozen": (tiny.class_diffusion, {"train": ["first_stage_model.*"]}, r"train: 'first_stage_model\.\*' matches no"),
    "empty": (tiny.class_diffusion, {"train": []}, "train: names nothing"),
    "rate": (tiny.class_diffusion, {"learning_rates": {"modle.*": 2.0}}, r"learning_rates: 'modle\.\*'.*model\.\*\?"),
    "rate of frozen": (tiny.class_diffusion, {"train": ["*.out.*"], "learning_rates": {"cond_stage_model.*": 2.0}},
                       r"learning_rates: 'cond_stage_model\.\*' matches no parameter that is trained"),
    "layers": (tiny.class_diffusion, {"adapter": LoRA(["first_stage_model.*"])}, r"adapter\.modules: 'first_stage"),
    "last layer": (tiny.autoencoder_training, {"train": ["encoder.*"]}, "train: .*decoder.conv_out.weight"),
    "codes": (tiny.vq_training, {"train": ["decoder.*"], "codebook": CodebookUpkeep(decay=0.9)}, "codebook: .*train"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_that_cannot_be_meant_are_refused_by_name(case: str) -> None:
    build, options, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as refused:
        build(**options)
    assert len(str(refused.value)) <= 300


# -------------------------------------------------------------------------------------------------------- optimisers


def section(target: str, **params: Any) -> dict[str, Any]:
    optimizer = {"target": target, "params": params}
    optimization = {"target": "ldm.training.optimization.Optimization", "params": {"optimizer": optimizer}}
    training = tiny.latent_diffusion_config(tiny.unet_config(), tiny.autoencoder_config(), optimization=optimization)
    return tiny.sections_of(training)["training"]


@pytest.mark.parametrize(
    ("target", "params", "kind"),
    [("torch.optim.SGD", {"momentum": 0.9}, SGD), ("torch.optim.Adam", {"eps": 1e-6}, Adam),
     ("torch.optim.Muon", {"momentum": 0.8}, Muon)],
)  # fmt: skip
def test_any_optimiser_by_its_target(target: str, params: dict[str, Any], kind: type, tmp_path: Path) -> None:
    node = section(target, **params)["params"]["optimization"]
    validate(node, "training.params.optimization")
    options = {"train": ["*.emb_layers.1.weight"]} if kind is Muon else {}  # matrices
    module = tiny.class_diffusion(optimization=instantiate(node), learning_rates={"*.emb_layers.*": 0.5}, **options)
    optimizer = fit(module, tmp_path, steps=2).optimizers[0]
    assert type(optimizer) is kind and optimizer.param_groups[-1]["lr"] == module.learning_rate / 2
    assert all(optimizer.param_groups[0][name] == value for name, value in params.items())


MISTAKES = {  # target and parameters: words of the message
    ("torch.optim.Adamm",): "has no Adamm; did you mean Adam",
    ("torch.nn.Linear",): "a Linear is not",
    ("ldm.training.lr_schedules.WarmUpCosine",): "a WarmUpCosine is not",
    ("torch.optim.lr_scheduler.StepLR",): "a StepLR is not",
    ("torch.optim.SGD", "momentun"): "unknown; did you mean momentum",
    ("torch.optim.SGD", "lr"): "lr: comes from the training",
    ("torch.optim.SGD", "params"): "params: comes from the training",
    ("os.system",): "cannot be called",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_optimiser_is_refused_before_anything_is_built(mistake: tuple[str, ...]) -> None:
    node = section(mistake[0], **dict.fromkeys(mistake[1:], 1.0))
    with pytest.raises(ConfigError, match=MISTAKES[mistake]) as refused:
        validate(node, "training", ("model",))
    assert "training.params.optimization.params.optimizer" in str(refused.value)


@pytest.mark.parametrize("kind", [LBFGS, SparseAdam])
def test_one_that_cannot_train_networks_is_refused(kind: type[Optimizer]) -> None:
    with pytest.raises(UserError, match=f"optimizer: {kind.__name__} cannot train"):
        build_optimizer(kind, [{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}], 1.0)


def test_one_that_does_not_take_the_parameters_says_what_to_choose() -> None:
    optimization = instantiate(section("torch.optim.Muon")["params"]["optimization"], "training.params.optimization")
    with pytest.raises(ConfigError, match=r"optimizer: torch.optim.Muon: Muon only supports 2D.*others by train"):
        tiny.class_diffusion(optimization=optimization).configure_optimizers()


def test_settings_of_adam_beside_another_one_are_refused() -> None:
    with pytest.raises(UserError, match="weight_decay: is AdamW's"):
        Optimization(weight_decay=0.1, optimizer=SGD)
    with pytest.raises(UserError, match="betas: is Adam's"):
        tiny.autoencoder_training(betas=(0.9, 0.99), optimizer=SGD)
    first_stage = tiny.autoencoder_training(optimizer=partial(AdamW, eps=1e-6))
    assert first_stage.configure_optimizers()["optimizer"].defaults["eps"] == 1e-6


# ------------------------------------------------------------------------------------------------ weights to start from


def test_a_discriminator_is_taken_and_an_absent_one_is_told(caplog: Any, tmp_path: Path) -> None:
    module, other = tiny.autoencoder_training(ema_decay=0.9), tiny.autoencoder_training(seed=1, ema_decay=0.9)
    fit(module, tmp_path, steps=2)
    load_into(other, module.state_dict(), source="FILE")
    assert largest_difference(dict(other.loss.state_dict()), dict(module.loss.state_dict())) == 0
    without = {name: value for name, value in module.state_dict().items() if "discriminator" not in name}
    own = {name: value.clone() for name, value in other.loss.state_dict().items()}
    load_into(other, without, source="FILE")
    assert "FILE: has no loss.discriminator (" in caplog.text and "start anew" in caplog.text
    assert all(torch.equal(value, own[name]) for name, value in other.loss.state_dict().items() if "disc" in name)
    half = {name: value for name, value in module.state_dict().items() if not name.endswith("main.0.bias")}
    with pytest.raises(UserError, match=r"1 missing \(loss.discriminator.main.0.bias"):
        load_into(other, half)


def test_averages_that_a_file_has_only_a_part_of_start_at_its_raw_weights() -> None:
    part, whole = tiny.class_diffusion(train=["*.out.2.*"]), tiny.class_diffusion(seed=1)
    nn.init.constant_(part.model_ema.get_buffer("diffusion_modelout2bias"), 7.0)
    load_into(whole, part.state_dict())
    averages = whole.model_ema.state_dict()
    assert float(averages["diffusion_modelout2bias"].mean()) == 7.0
    weight = part.model.model.diffusion_model.time_embed[0].weight
    assert torch.equal(averages["diffusion_modeltime_embed0weight"], weight)


@pytest.mark.parametrize("averaged", [True, False])
def test_added_input_channels_start_at_zero(averaged: bool, caplog: Any) -> None:
    old = tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), ema_decay=0.9 if averaged else None)
    masks = tiny.node("conditioning.images.ImageConditioner", key="low_res", channels=3)
    new = tiny.latent_diffusion(tiny.unet(extra=3), tiny.autoencoder(1), instantiate(masks), ema_decay=0.9)
    load_into(new, old.state_dict(), source="FILE", widen=True)
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([3, 7])
    network, before = new.model.model.diffusion_model, old.model.model.diffusion_model
    expected = before(x, t)
    torch.testing.assert_close(network(torch.cat([x, torch.randn(2, 3, 4, 4)], dim=1), t), expected)
    assert float(new.model_ema.get_buffer("diffusion_modelinput_blocks00weight")[:, 2:].abs().max()) == 0
    assert "FILE: model.diffusion_model.input_blocks.0.0.weight has 2 input channels, here 5" in caplog.text
    with pytest.raises(UserError, match="another shape"):
        load_into(new, old.state_dict())  # of a model that is only used


def test_no_channels_are_taken_away() -> None:
    old, new = (tiny.autoencoder_training(with_discriminator=False) for _ in range(2))
    new.model = tiny.autoencoder(channels=1)
    with pytest.raises(UserError, match=r"encoder.conv_in.weight \(32, 3, 3, 3\) in the file, \(32, 1, 3, 3\) here"):
        load_into(new, old.state_dict(), widen=True)


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_an_adapter_alone_is_trained_averaged_and_stored(kind: type, tmp_path: Path) -> None:
    adapter = kind(BLOCKS, rank=2)
    module = tiny.class_diffusion(adapter=adapter, ema_decay=0.5)
    load_into(module, choose(lively().state_dict(), "raw"))
    assert all(map(is_of_adapter, trained(module)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, tmp_path, steps=3)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if not name.startswith("model_ema.")} == trained(module)
    assert sum(".lora" not in name and "lora_" not in name for name in module.model_ema.state_dict()) == 2  # counters
    plain = tiny.class_diffusion(seed=5)
    load_into(plain, module.state_dict())  # merged, for a model that has no adapter
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([3, 7])
    batch = {"class_label": torch.tensor([0, 1])}
    ours, merged = (each.eval().model.denoiser(each.model.condition(batch))(x, t) for each in (module, plain))
    torch.testing.assert_close(merged.eps, ours.eps, atol=1e-6, rtol=1e-5)


def test_one_beside_patterns_and_on_the_weights_of_a_base() -> None:
    base = lively()
    module = tiny.class_diffusion(adapter=DoRA(BLOCKS, rank=2), train=["*.in_layers.0.*"])
    assert {is_of_adapter(name) for name in trained(module)} == {True, False}
    load_into(module, choose(base.state_dict(), "raw"))
    x, t, batch = torch.randn(2, 2, 4, 4), torch.tensor([3, 7]), {"class_label": torch.tensor([0, 1])}
    ours, theirs = (each.eval().model.denoiser(each.model.condition(batch))(x, t).eps for each in (module, base))
    assert torch.equal(ours, theirs)  # magnitudes start at those of the weights that were loaded
    weights = {name: value for name, value in module.model.state_dict().items() if name.endswith("vector")}
    shadow = dict(module.model_ema.named_buffers())
    for name, value in weights.items():
        assert torch.equal(shadow[name.removeprefix("model.").replace(".", "")], value)


def test_a_layer_without_part_in_the_loss_is_named(tmp_path: Path) -> None:
    module = tiny.class_diffusion(ema_decay=None)
    module.model.model.diffusion_model.idle = nn.Linear(4, 4)
    module.choose(None, None, LoRA([*BLOCKS, "*.idle"], rank=2))
    with pytest.raises(UserError, match=r"no gradient reaches model\.diffusion_model\.idle"):
        fit(module, tmp_path, steps=1)


def test_dora_of_weights_that_are_zero_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out_layers\.3 and 4 more: outputs whose weights are all 0.*LoRA"):
        fit(tiny.class_diffusion(adapter=DoRA(["*.out_layers.3"], rank=2)), tmp_path, steps=1)
    fit(tiny.class_diffusion(adapter=LoRA(["*.out_layers.3"], rank=2)), tmp_path, steps=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a config, and the run folder of a training of two steps."""
    folder = tmp_path_factory.mktemp("base")
    config = write_config(folder, "diffusion")
    assert main(["-b", str(config), "-t", "-l", str(folder / "logs"), "--max_steps", "2", *QUIET]) == 0
    return config, next((folder / "logs").iterdir())


QUIET = ["training.params.ema_decay=0.9", "data.params.test=null", "lightning.trainer.limit_val_batches=0"]
ADAPTER = "{target: ldm.weights.adapters.DoRA, params: {modules: ['*.emb_layers.1', '*.in_layers.2'], rank: 2}}"


def test_a_run_of_an_adapter_goes_on_to_the_bit_and_is_exported(base: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = base
    words = [f"training.params.adapter={ADAPTER}", f"training.checkpoint={run}",
             "training.params.learning_rates={'*.lora_magnitude_vector': 0.1}", *QUIET]  # fmt: skip
    ends = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        start = ["-b", str(config), "-t", "-l", str(tmp_path / name), *words]
        assert main([*start, "--max_steps", str(stops[0])]) == 0
        folder = next((tmp_path / name).iterdir())
        for stop in stops[1:]:
            assert main(["-r", str(folder), "-t", "--max_steps", str(stop)]) == 0
        ends.append(storage.load(folder / "checkpoints" / "last.ckpt")["state_dict"])
    assert largest_difference(*ends) == 0
    held = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.endswith("in_layers.2.weight") for name in held)  # the base is stored once, beside
    file, merged = tmp_path / "a.safetensors", tmp_path / "merged.safetensors"
    export_run(folder, file, format="adapter")
    export_run(folder, merged, adapters=[])
    with pytest.raises(UserError, match="merged into this model already"):
        export_run(folder, tmp_path / "twice.safetensors", adapters=[f"{file}"])
    inside, beside = LatentDiffusion.from_pretrained(folder), LatentDiffusion.from_pretrained(run, weights="raw")
    beside.load_adapter(str(file))
    for other in (beside, LatentDiffusion.from_pretrained(merged)):
        assert largest_difference(dict(inside.state_dict()), dict(other.state_dict())) < 1e-6
    with pytest.raises(UserError, match="merged into this model already"):
        LatentDiffusion.from_pretrained(merged, adapters=[str(file)])


def test_another_choice_is_refused_and_other_factors_are_used_by_a_run_that_goes_on(
    base: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    config, _ = base
    start = ["-b", str(config), "-t", "-l", str(tmp_path), "--max_steps", "1", *QUIET, "training.params.ema_decay=null"]
    assert main([*start, "training.params.train=['*.emb_layers.1.*']"]) == 0
    (run,) = tmp_path.iterdir()
    go_on = ["-r", str(run), "-t", "--max_steps", "2"]
    for change, words in (
        ("training.params.train=['*.out.2.*']", "trains other parameters"),
        ("training.params.optimization={target: ldm.training.optimization.Optimization, "
         "params: {optimizer: {target: torch.optim.SGD}}}", "trained by AdamW, whose state SGD cannot use"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*go_on, change])
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert main([*go_on, "training.params.learning_rates={'*.bias': 0.1}"]) == 0
    state = storage.load(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert len(state["param_groups"]) == 2 and {int(value["step"]) for value in state["state"].values()} == {2}


@pytest.mark.proof
def test_the_judge_of_the_proof_knows_rings_from_old_shapes() -> None:
    rng = np.random.default_rng(1)
    assert all(is_ring(ring(colour, rng), colour) for colour in ("red", "green", "blue", "yellow", "purple", "black"))
    old = Shapes(12, num_objects=(1, 1))
    assert not any(is_ring(old[index]["image"], old[index]["caption"].split()[-2]) for index in range(12))
