"""Settings of time that do not fit together are refused in one line, with their place, before anything is trained."""

from pathlib import Path

import pytest
import torch

from ldm import compat
from ldm.config.plain import plain
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.grids import resolve_grid
from ldm.errors import ConfigError, UserError
from ldm.training.run import instantiate_training

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "txt2img_shapes.yaml"
PROCESS, PREDICTION = "model.params.process", "model.params.prediction"
EPSILON = f"{PREDICTION}={{target: ldm.diffusion.prediction.Epsilon}}"
FLOW = [
    f"{PROCESS}=null", f"{PROCESS}={{target: ldm.diffusion.rectified_flow.RectifiedFlow}}",
]  # fmt: skip
OBJECTIVE = "training.params.objective={{target: ldm.diffusion.objective.Objective, params: {{{}}}}}"
FAR = "times: {target: ldm.diffusion.times.LogNormal, params: {mean: 30.0}}"
BAD_DENSITY = "times: {target: ldm.diffusion.times.LogitNormal, params: {std: 0.0}}"
BAD_WEIGHTING = "weighting: {target: ldm.diffusion.weighting.MinSNR, params: {gamma: -1.0}}"


def refused(words: list[str]) -> str:
    config = plain(compat.load(CONFIG, words))
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        instantiate_training(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "place", "names"),
    [
        ([f"{PROCESS}.params.zero_terminal_snr=true", EPSILON], "model: ", ("Epsilon", "DiscreteVP", "Velocity")),
        ([*FLOW, EPSILON], "model: ", ("Epsilon", "RectifiedFlow")),
        ([*FLOW, OBJECTIVE.format("elbo_weight: 0.1")], "training: ", ("elbo_weight", "RectifiedFlow")),
        ([*FLOW, OBJECTIVE.format("learn_logvar: true")], "training: ", ("learn_logvar", "RectifiedFlow")),
        ([OBJECTIVE.format(FAR)], "training: ", ("LogNormal", "N(30, 1.2)", "DiscreteVP")),
        ([OBJECTIVE.format(BAD_DENSITY)], "training.params.objective.params.times: ", ("LogitNormal", "std is 0.0")),
        (
            [OBJECTIVE.format(BAD_WEIGHTING)],
            "training.params.objective.params.weighting: ",
            ("MinSNR", "gamma is -1.0"),
        ),
        ([f"{PROCESS}.params.num_steps=0"], "", (f"{PROCESS}.params.num_steps", "0")),
    ],
)
def test_what_a_process_cannot_have_is_refused(words: list[str], place: str, names: tuple[str, ...]) -> None:
    if place:
        message = refused(words)
        assert message.startswith(place)
    else:
        with pytest.raises(ConfigError) as caught:
            compat.load(CONFIG, words)
        message = str(caught.value)
    assert all(name in message for name in names), message
    assert "\n" not in message


def test_more_steps_than_the_process_has_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        resolve_grid("uniform")(DiscreteVP.linear(10), 11)
    assert "11" in str(caught.value) and "1 to 10" in str(caught.value)
