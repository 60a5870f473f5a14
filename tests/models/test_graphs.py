"""Recorded calls of a backbone: one recording a shape, the plain numbers, and the plain path where there is none."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from ldm.models.generate import Request, generate
from ldm.models.graphs import Graphs, Run, graphed
from ldm.models.guidance import Guidance
from ldm.models.inpainting import InpaintingTarget
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.tiled import tile
from ldm.networks.layers import store_in_half
from ldm.sampling import make_sampler

SIZE = (tiny.SIZE, tiny.SIZE)


class Again:
    """Record by running the function again, which leaves its output where the first one lies; counts both."""

    def __init__(self, *problems: Exception) -> None:
        self.problems, self.recorded, self.replayed = list(problems), 0, 0

    def __call__(self, run: Run) -> tuple[Callable[[], object], Tensor]:
        if self.problems:
            raise self.problems.pop()
        self.recorded += 1
        output = run()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output


def model(recorder: Again | None = None, limit: int = 8) -> LatentDiffusion:
    made = tiny.class_diffusion().model.eval().requires_grad_(False)
    made.graphs = Graphs(None if recorder is None else lambda device: recorder, limit)
    return made


def draw(model: LatentDiffusion, count: int = 2, steps: int = 3, size: tuple[int, int] = SIZE, **how: object) -> Tensor:
    sampler = make_sampler(str(how.pop("sampler", "ddim")), steps=steps)
    request = Request(range(count), size, {"class_label": torch.arange(count) % 3}, **how)
    return torch.cat(list(generate(model, sampler, request)))


WAYS = {
    "plain": {},
    "guided": {"guidance": 3.0},
    "in an interval": {"guidance": Guidance(3.0, interval=(0.2, 0.8)), "steps": 6},
    "projected": {"guidance": Guidance(3.0, apg_momentum=-0.5, rescale=0.5)},
    "multistep": {"sampler": "plms", "steps": 5},
    "half precision": {"autocast": torch.bfloat16},
    "from images": {"images": torch.rand(2, 3, *SIZE), "sampler": "euler_ancestral"},
    "inpainting": {"target": InpaintingTarget(torch.rand(2, 3, *SIZE), (torch.rand(2, 1, *SIZE) > 0.5).float())},
}


@pytest.mark.parametrize("way", WAYS)
def test_recorded_walks_give_the_plain_numbers(way: str) -> None:
    recorder = Again()
    torch.testing.assert_close(
        draw(model(recorder), **dict(WAYS[way])), draw(model(), **dict(WAYS[way])), rtol=0, atol=0
    )
    assert recorder.recorded in (1, 2) and recorder.replayed >= 1


def test_tiles_share_one_recording() -> None:
    recorder, plain = Again(), model()
    size, side = (16, 24), 8
    assert torch.equal(draw(tile(model(recorder), side), size=size), draw(tile(plain, side), size=size))
    assert recorder.recorded == 1 and recorder.replayed == 3 * 15 - 1  # steps times tiles, but for the first call


def test_a_guide_has_recordings_of_its_own() -> None:
    recorder, weaker = Again(), model(other := Again())
    torch.nn.init.normal_(weaker.model.diffusion_model.out[-1].weight, std=0.2)
    guidance = Guidance(2.0, guide=weaker)
    recorded = draw(model(recorder), guidance=guidance)
    assert recorder.recorded == other.recorded == 1
    assert torch.equal(recorded, draw(model(), guidance=guidance, graphs=False))


def test_a_shape_is_recorded_when_it_comes_again_and_conditions_are_inputs() -> None:
    recorder, own = Again(), model(Again())
    own.graphs = Graphs(lambda device: recorder)
    draw(own, steps=1)
    assert recorder.recorded == 0
    for labels in ([0, 1], [2, 2]):
        request = Request([5, 6], SIZE, {"class_label": torch.tensor(labels)})
        (images,) = generate(own, make_sampler("ddim", steps=3), request)
        (expected,) = generate(model(), make_sampler("ddim", steps=3), request)
        assert torch.equal(images, expected)
    assert recorder.recorded == 1 and recorder.replayed == 6
    draw(own, count=3)
    assert recorder.recorded == len(own.graphs) == 2


def test_one_too_many_takes_the_place_of_all() -> None:
    recorder, made = Again(), []
    own = model(limit=2)
    own.graphs = Graphs(lambda device: made.append(device) or recorder, limit=2)
    for count in (1, 2, 1, 2):
        draw(own, count)
    assert (recorder.recorded, len(own.graphs), len(made)) == (2, 2, 1)
    draw(own, 3, steps=1)  # what comes once leaves them where they are
    assert (recorder.recorded, len(own.graphs)) == (2, 2)
    draw(own, 3)
    assert (recorder.recorded, len(own.graphs), len(made)) == (3, 1, 2)
    assert torch.equal(draw(own, 2), draw(model(), 2)) and recorder.recorded == 4


def test_new_values_in_place_are_used_and_weights_that_moved_are_recorded_anew() -> None:
    recorder, plain = Again(), model()
    own = model(recorder)
    before = draw(own)
    for one in (own, plain):
        one.model.diffusion_model.out[-1].weight.mul_(2)
    assert torch.equal(draw(own), draw(plain)) and not torch.equal(draw(own), before) and recorder.recorded == 1
    weight = own.model.diffusion_model.out[-1].weight
    weight.data = weight.data.clone()
    assert torch.equal(draw(own), draw(plain)) and recorder.recorded == 2


@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation\nnot permitted")]
)
def test_a_failure_is_one_line_and_the_plain_path(problem: Exception, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Again(problem)
    own = model(recorder)
    with caplog.at_level(logging.WARNING):
        images = [draw(own), draw(own), draw(own, count=3)]
    assert torch.equal(images[0], draw(model())) and torch.equal(images[1], images[0]) and recorder.recorded == 0
    (line,) = caplog.messages
    assert "no CUDA graphs" in line and str(problem).split()[0] in line and "\n" not in line and len(line) < 300


def test_the_first_of_two_errors_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def record(run: Run) -> tuple[Callable[[], object], Tensor]:
        try:
            raise RuntimeError("cannot wait")
        finally:
            raise RuntimeError("capture is invalid")  # as the end of a capture does

    own = model()
    own.graphs = Graphs(lambda device: record)
    draw(own)
    assert "cannot wait" in caplog.text and "invalid" not in caplog.text


def test_hooks_run_at_every_call() -> None:
    recorder, calls = Again(), []
    own = model(recorder)
    handle = own.model.diffusion_model.middle_block.register_forward_hook(lambda *_: calls.append(1))
    draw(own)
    assert len(calls) == 3 and recorder.recorded == 0 and graphed(own) is own.model
    handle.remove()
    draw(own)
    assert recorder.recorded == 1


def test_off_is_off_and_a_cpu_records_nothing() -> None:
    recorder, plain = Again(), model()
    draw(model(recorder), graphs=False)
    draw(plain)
    assert recorder.recorded == recorder.replayed == len(plain.graphs) == 0


def test_outputs_are_the_caller_s_and_inference_mode_may_come_and_go() -> None:
    own = model(Again())
    network, noise = graphed(own), torch.randn(3, 1, tiny.CHANNELS, 4, 4)
    condition = own.condition({"class_label": [1]})
    kept = []
    for x, inference in zip([*noise, *noise], (False, True) * 3, strict=True):
        with torch.inference_mode(inference):
            kept.append(network(x, torch.ones(1), condition))
    for x, output in zip([*noise, *noise], kept, strict=True):
        torch.testing.assert_close(output, own.model(x, torch.ones(1), condition), rtol=0, atol=0)


def test_copies_begin_without_recordings_and_models_are_freed() -> None:
    own = model(Again())
    draw(own)
    assert len(own.graphs) == 1 and len(copy.deepcopy(own).graphs) == 0
    own.graphs.clear()
    assert len(own.graphs) == 0
    draw(own)
    gone = weakref.ref(own.model.diffusion_model)
    del own
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_give_the_numbers_of_autocast(dtype: torch.dtype) -> None:
    plain, half = model(), model()
    store_in_half(half.model, dtype)
    sizes = [sum(p.nbytes for p in one.model.parameters()) for one in (plain, half)]
    assert sizes[1] < 0.55 * sizes[0]
    assert torch.equal(draw(plain, autocast=dtype, guidance=2.0), draw(half, autocast=dtype, guidance=2.0))
