"""Guidance of a model: what it does, what it costs, what it refuses; in Python, by words, and in YAML."""

from dataclasses import replace

import pytest
import tiny
import torch

from ldm.conditioning.labels import ClassConditioner
from ldm.config import instantiate
from ldm.diffusion.edm import EDM
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError
from ldm.models.generate import Request, generate
from ldm.models.guidance import Guidance
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling import make_sampler, sampler_names
from ldm.sampling.base import intervals_of

EVERYTHING = Guidance(3.0, interval=(0.2, 0.8), rescale=0.7, apg_eta=0.2, apg_norm=4.0, apg_momentum=-0.5)
GUIDANCES = [Guidance(), Guidance(2.0, interval=(0.0, 0.5)), EVERYTHING]


NETWORK = {"context_dim": tiny.WIDTH, "attention_factors": [1]}


def model_of(seed=0):
    """Return a class-conditional model of which no layer is zero, so that classes differ."""
    torch.manual_seed(seed)
    network, conditioner = tiny.unet(**NETWORK), ClassConditioner(4, tiny.WIDTH, null_label=3, drop_rate=0.3)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return tiny.latent_diffusion(network, tiny.autoencoder(seed), conditioner).model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def weaker():
    return model_of(1)


def unconditional(seed=0, **options):
    return tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(seed), **options).model.eval()


def drawn(model, guidance, sampler="ddim", steps=4, **options):
    request = Request([1, 2], (8, 8), {"class_label": [0, 1]}, guidance, **options)
    return torch.cat(list(generate(model, make_sampler(sampler, steps=steps), request)))


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("name", sampler_names())
def test_evaluations_are_those_of_the_network(model, name, guidance):
    """Counted on the network itself: a batch of both predictions is two evaluations of each sample."""
    counted = []
    hook = model.model.register_forward_hook(lambda module, inputs, output: counted.append(len(output) // 2))
    try:
        images = drawn(model, guidance, name, steps=3)
    finally:
        hook.remove()
    assert images.isfinite().all()
    assert guidance.evaluations(make_sampler(name, steps=3), model.process) == sum(counted)


def test_counting_draws_nothing(model):
    torch.manual_seed(0)
    want, _ = torch.rand(1), torch.manual_seed(0)
    Guidance(2.0).evaluations(make_sampler("dpm_solver_sde", steps=5), model.process)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize(
    ("name", "evaluations"), [("ddim", 10), ("heun", 19), ("plms", 11), ("dpm_solver", 10), ("unipc", 10)]
)
def test_evaluations_of_ten_steps(name, evaluations):
    sampler = make_sampler(name, steps=10)
    assert Guidance().evaluations(sampler, EDM()) == evaluations
    assert Guidance(3.0).evaluations(sampler, EDM()) == 2 * evaluations


@pytest.mark.parametrize(
    "process", [RectifiedFlow(), EDM(), tiny.DiscreteVP.linear(1000)], ids=lambda p: type(p).__name__
)
def test_an_interval_is_a_part_of_the_walk_in_the_time_of_the_process(process):
    sampler = make_sampler("euler", steps=10, grid="uniform" if process.num_steps else "log_snr")
    start, stop = 0.25, 0.6
    latest, earliest = process.from_uniform(torch.tensor([1 - start, 1 - stop], dtype=torch.float64)).tolist()
    inside = [earliest <= step.t <= latest for step in intervals_of(sampler.times(process), process)]
    assert 0 < sum(inside) < 10
    assert Guidance(2.0, (start, stop)).evaluations(sampler, process) == 10 + sum(inside)
    assert Guidance(2.0, (0.0, stop)).evaluations(sampler, process) > 10 + sum(inside)


def test_the_whole_interval_and_no_rescaling_are_plain_guidance(model):
    assert torch.equal(drawn(model, 3.0), drawn(model, Guidance(3.0, (0.0, 1.0), 0.0, 1.0)))
    for changed in (Guidance(3.0, (0.3, 1.0)), Guidance(3.0, rescale=0.5), Guidance(3.0, apg_eta=0.0)):
        assert not torch.equal(drawn(model, changed), drawn(model, 3.0))


def test_a_guide_is_what_guidance_goes_away_from(model, weaker):
    x_t, t = torch.randn(2, tiny.CHANNELS, 8, 8), torch.tensor([9.0, 9.0])
    batch = {"class_label": [0, 1]}
    ours, theirs = (one.denoiser(one.condition(batch))(x_t, t) for one in (model, weaker))
    guidance = Guidance(3.0, guide=weaker).ready(model)
    found = model.denoiser(model.condition(batch), guidance, guide=guidance.denoiser_of_guide(batch))(x_t, t)
    torch.testing.assert_close(found.x0, theirs.x0 + 3 * (ours.x0 - theirs.x0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn(model, Guidance(3.0, guide=weaker)), drawn(model, 3.0))
    torch.testing.assert_close(drawn(model, Guidance(3.0, guide=model)), drawn(model, 1.0), atol=1e-4, rtol=1e-3)


def test_an_unconditional_model_has_guides_but_no_scale_of_its_own():
    model, guide = unconditional(), unconditional(1)
    images = model.sample(2, steps=2, guidance=Guidance(2.0, guide=guide))
    assert images.shape == (2, 3, 8, 8)
    for sample in (lambda: model.sample(2, steps=2, guidance=2.0), lambda: model.denoiser(None, 2.0)):
        with pytest.raises(UserError, match="scale 2 .*without condition.*guide"):
            sample()


def test_a_guide_may_be_a_path(model, weaker, tmp_path):
    section = tiny.latent_diffusion_config(
        tiny.unet_config(**NETWORK), tiny.autoencoder_config(),
        tiny.node("conditioning.labels.ClassConditioner", num_classes=4, embed_dim=tiny.WIDTH, null_label=3),
    )["params"]["model"]  # fmt: skip
    path = weaker.save_pretrained(tmp_path / "weaker", section)
    read = Guidance.parse(3.0, ["rescale=0.5"], str(path)).ready(model)
    torch.testing.assert_close(drawn(model, read), drawn(model, Guidance(3.0, rescale=0.5, guide=weaker)))
    assert read.record()["guide"]["checkpoint"] == str(path) and len(read.record()["guide"]["checkpoint_sha256"]) == 64
    assert Guidance(3.0).record() == 3.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: unconditional(process=EDM()), "another process"),
        (lambda: unconditional(num_steps=40), "another process"),
        (lambda: unconditional(latent_scale=0.5), "latent scale is 0.5"),
        (lambda: tiny.latent_diffusion(tiny.unet(3), tiny.IdentityAutoencoder()).model, "3 channels"),
        (
            lambda: tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(channel_mult=[1, 1, 1])).model,
            "1/4 of the image, those of the model 1/2",
        ),
    ],
)
def test_a_guide_of_other_latents_is_refused(model, change, named):
    with pytest.raises(UserError, match=f"guide.*{named}"):
        Guidance(2.0, guide=change()).ready(model)


def test_guidance_needs_a_null_condition():
    conditioner = ClassConditioner(4, tiny.WIDTH)
    model = tiny.latent_diffusion(tiny.unet(context_dim=tiny.WIDTH), tiny.autoencoder(), conditioner).model
    with pytest.raises(UserError, match="null_label"):
        model.sample([0], steps=2, guidance=2.0)
    assert len(model.sample([0], steps=2, guidance=2.0, negative=[1]))


def test_a_negative_condition_of_the_guidance_is_that_of_every_sample(model):
    guidance = Guidance(3.0, negative={"class_label": 2})
    expected = model.sample([0, 1], steps=3, guidance=3.0, negative=[2, 2])
    assert torch.equal(model.sample([0, 1], steps=3, guidance=guidance), expected)
    assert not torch.equal(expected, model.sample([0, 1], steps=3, guidance=3.0))
    assert guidance.record()["negative"] == {"class_label": 2}
    for negative, named in (("blurry", "not conditioned on text"), ({"label": 2}, "label: .*it has class_label")):
        with pytest.raises(UserError, match=f"negative: .*{named}"):
            model.sample([0], steps=2, guidance=Guidance(2.0, negative=negative))
    with pytest.raises(UserError, match="negative: no effect at scale 1"):
        Guidance(negative="blurry")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["interval=0.2:1.5"], "interval is 0.2:1.5"),
        (["interval=0.8:0.2"], "interval is 0.8:0.2"),
        (["interval=0.5"], "START:STOP"),
        (["interval"], "START:STOP"),
        (["rescale=2"], "rescale is 2"),
        (["rescale=much"], "rescale is a number"),
        (["apg_norm=0"], "apg_norm is 0"),
        (["apg_momentum=nan"], "apg_momentum is nan"),
        (["intervall=0:1"], "intervall.*interval"),
        (["scale=2"], "scale=2: unknown"),
        (["rescale=0.5", "rescale=0.7"], "rescale is given twice"),
    ],
)
def test_mistakes_are_named_in_one_line(words, named):
    with pytest.raises(UserError, match=f"guidance.*{named}") as caught:
        Guidance.parse(2.0, words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_what_has_no_effect_is_refused():
    for words, guide in ((["interval=0.2:0.8"], None), (["rescale=0.5"], None), ([], "logs/run")):
        with pytest.raises(UserError, match="no effect at scale 1"):
            Guidance.parse(1.0, words, guide)
    assert Guidance.parse(1.0, ["interval=0:1"]) == Guidance()


def test_guidance_in_yaml():
    params = {"scale": 3, "interval": [0.2, 0.8], "rescale": 0.7, "apg_eta": 0.2, "apg_norm": 4, "apg_momentum": -0.5}
    assert instantiate(tiny.node("models.guidance.Guidance", **params)) == EVERYTHING
    with pytest.raises(UserError, match="callback.*interval"):
        instantiate(tiny.node("models.guidance.Guidance", scale=3, interval=[0.2, 2]), "callback")


def test_a_model_of_the_library_takes_any_guidance(model):
    assert isinstance(model, LatentDiffusion)
    plain = model.sample([0, 1], steps=3, guidance=3.0)
    assert not torch.equal(model.sample([0, 1], steps=3, guidance=replace(EVERYTHING, interval=(0.0, 1.0))), plain)
