"""Every conditioner that the package has keeps the contract of its base class."""

import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch

import ldm.conditioning
from ldm.autoencoder.regularizers import KL
from ldm.conditioning.base import Conditioner, Conditioning, JointConditioner
from ldm.conditioning.images import FirstStageConditioner, ImageConditioner, InpaintingConditioner, SpatialRescaler
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.sizes import SizeConditioner
from ldm.conditioning.text import (
    CLIPTextConditioner,
    EmbeddingConditioner,
    TextConditioner,
    TokenConditioner,
    TrainedTokenizer,
)
from ldm.data.layout.boxes import BoxTokenizer
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder
from ldm.networks.encoder_decoder import Architecture
from ldm.training.made_up_steps import conditioning

B = 3
CAPTIONS = ["a red circle", "a blue square", "two green triangles"]


def trained_tokenizer():
    tokenizer = TrainedTokenizer(max_length=8, vocab_size=128)
    tokenizer.fit(CAPTIONS)
    return tokenizer


def first_stage(cls, **options):
    conditioner = cls("masked", **options)
    architecture = Architecture(channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, resolution=16)
    conditioner.use_first_stage(Autoencoder(architecture, KL(), embed_dim=4).eval().requires_grad_(False))
    return conditioner


def picture(channels=3):
    return torch.randn(B, channels, 16, 16)


def make(cls, clip_folder, **options):
    """Build a small conditioner of the class and a batch for it."""
    labels = torch.tensor([1, 5, 2])
    if cls is ClassConditioner:
        return cls(11, 16, "y", null_label=10, **options), {"y": labels}
    if cls is TokenConditioner:
        return cls(20, 6, 16, 1, "ids", null_tokens=[3, 4], **options), {"ids": torch.randint(0, 20, (B, 6))}
    if cls is TextConditioner:
        return cls(trained_tokenizer(), 16, 1, key="text", **options), {"text": CAPTIONS}
    if cls is CLIPTextConditioner:
        return cls(str(clip_folder), 8, "text", **options), {"text": CAPTIONS}
    if cls is LayoutConditioner:
        boxes = torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(B, 2, 4)
        layouts = {"boxes": boxes, "box_labels": torch.tensor([[0, 1], [3, -1], [2, 2]])}
        return cls(BoxTokenizer(5, max_objects=2, vocab_size=64), 16, 1, **options), layouts
    if cls is EmbeddingConditioner:
        return cls("e", 16, num_tokens=2, **options), {"e": torch.randn(B, 2, 16)}
    if cls is ImageConditioner:
        return cls("low_res", **options), {"low_res": picture()}
    if cls is SpatialRescaler:
        return cls("map", 1, in_channels=5, out_channels=3, **options), {"map": picture(5)}
    if cls is FirstStageConditioner:
        return first_stage(cls, mask_key="mask", **options), {"masked": picture(), "mask": picture(1)}
    if cls is InpaintingConditioner:
        return first_stage(cls, latent_scale=0.5, **options), {"masked": picture(), "mask": picture(1)}
    if cls is SizeConditioner:
        return cls(dim=8, **options), {"original_size": torch.tensor([[512, 256], [64, 64], [1, 1000]])}
    raise AssertionError(f"{cls.__name__} is new: add a small one here, so that it is tested")


def found():
    classes = set()
    for info in pkgutil.iter_modules(ldm.conditioning.__path__, "ldm.conditioning."):
        for _, cls in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if issubclass(cls, Conditioner) and cls is not Conditioner:
                classes.add(cls)
    return sorted(classes, key=lambda cls: cls.__name__)


pytestmark = pytest.mark.parametrize("cls", found(), ids=lambda cls: cls.__name__)


def filled(conditioning: Conditioning, slot: str) -> torch.Tensor:
    assert [name for name in ("concat", "context", "vector") if getattr(conditioning, name) is not None] == [slot]
    return getattr(conditioning, slot)


def test_fills_its_slot_for_the_whole_batch(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    value = filled(conditioner.eval()(batch), conditioner.slot)
    assert len(value) == B and torch.isfinite(value).all()
    assert value.dim() == {"concat": 4, "context": 3, "vector": 2}[conditioner.slot]


def test_dropped_samples_are_the_null_and_the_others_are_kept(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    conditioner.eval()
    kept = filled(conditioner(batch), conditioner.slot)
    null = filled(conditioner.unconditional(B), conditioner.slot)
    mixed = filled(conditioner(batch, torch.tensor([True, False, True])), conditioner.slot)
    torch.testing.assert_close(mixed[1], kept[1])
    torch.testing.assert_close(mixed[[0, 2]], null[[0, 2]].expand_as(mixed[[0, 2]]))
    assert not torch.equal(mixed[0], kept[0])


def test_condition_and_null_stack_for_guidance(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    conditioner.eval()
    condition = conditioner(batch)
    pair = Conditioning.stack([conditioner.unconditional(B), condition])
    assert pair.batch_size == 2 * B
    torch.testing.assert_close(filled(pair[B:], conditioner.slot), filled(condition, conditioner.slot))


def test_different_conditions_differ(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    value = filled(conditioner.eval()(batch), conditioner.slot)
    assert not torch.allclose(value[0], value[1])


def test_a_made_up_condition_is_of_the_same_shape(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    value = filled(conditioner.eval()(batch), conditioner.slot)
    z = torch.zeros(B, 4, *(value.shape[2:] if conditioner.slot == "concat" else (8, 8)))
    made_up = filled(conditioning(conditioner, B, (16, 16), z), conditioner.slot)
    assert made_up.shape == value.shape and made_up.dtype == value.dtype


def uniform():
    return partial(torch.rand, generator=torch.Generator().manual_seed(0))


def test_drop_is_drawn_per_sample_at_the_rate(cls, clip_folder):
    conditioner, _ = make(cls, clip_folder, drop_rate=0.3)
    n = 4000
    drop = conditioner.draw_drop(n, uniform())
    assert drop.shape == (n,) and drop.dtype == torch.bool
    assert abs(drop.float().mean() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    assert torch.equal(drop, conditioner.draw_drop(n, uniform()))


def test_missing_key_names_the_key_and_what_there_is(cls, clip_folder):
    conditioner, _ = make(cls, clip_folder)
    with pytest.raises(UserError, match=f"'{conditioner.key}'.* other"):
        conditioner({"other": 1})


def test_bad_drop_rate_is_refused(cls, clip_folder):
    with pytest.raises(UserError, match="drop_rate is 1.5"):
        make(cls, clip_folder, drop_rate=1.5)


def test_frozen_conditioner_stays_in_eval_mode_without_gradient(cls, clip_folder):
    options = {"trainable": False} if "trainable" in inspect.signature(cls).parameters else {}
    conditioner, batch = make(cls, clip_folder, **options)
    conditioner.train()
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not filled(conditioner(batch), conditioner.slot).requires_grad


def test_trainable_conditioner_learns_also_its_null(cls, clip_folder):
    if "trainable" not in inspect.signature(cls).parameters:
        pytest.skip("nothing to learn")
    conditioner, batch = make(cls, clip_folder, trainable=True)
    value = filled(conditioner.train()(batch, torch.tensor([True] * B)), conditioner.slot)
    if conditioner.slot == "context":
        value.square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.parameters())
    else:
        assert not value.any()


def test_works_as_part_of_several(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    joint = JointConditioner(first=conditioner, label=ClassConditioner(4, 16, "label", null_label=3)).eval()
    batch = {**batch, "label": torch.tensor([0, 1, 2])}
    assert joint(batch, joint.draw_drop(B)).batch_size == B
    pair = Conditioning.stack([joint.unconditional(B), joint(batch)])
    assert pair.batch_size == 2 * B


def test_moves_with_its_module(cls, clip_folder):
    conditioner, _ = make(cls, clip_folder)
    conditioner.to("meta")
    assert conditioner.device.type == "meta"


def test_tells_the_width_of_what_it_gives(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    value = filled(conditioner.eval()(batch), conditioner.slot)
    given = {"concat": value.shape[1:2], "context": value.shape[2:], "vector": value.shape[1:]}[conditioner.slot][0]
    assert conditioner.widths() == {conditioner.slot: given}


def test_what_is_kept_in_guidance_is_that_of_the_batch(cls, clip_folder):
    conditioner, batch = make(cls, clip_folder)
    conditioner.eval()
    away, condition = (
        filled(each, conditioner.slot) for each in (conditioner.unconditional(B, batch), conditioner(batch))
    )
    assert torch.equal(away, condition) is conditioner.is_kept
