"""The value object, several conditioners together, and the network that takes them."""

from functools import partial

import pytest
import tiny
import torch

from ldm.conditioning.base import Conditioning, JointConditioner
from ldm.conditioning.images import ImageConditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.text import EmbeddingConditioner
from ldm.errors import UserError
from ldm.models.conditional_network import ConditionalNetwork

B = 2


def everything() -> Conditioning:
    return Conditioning(torch.randn(B, 3, 4, 4), torch.randn(B, 5, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_outside_the_table_are_named(label):
    options = [{"embed_dim": 8}, {"slot": "vector"}]
    for conditioner in [ClassConditioner(5, key="kind", null_label=4, **option) for option in options]:
        for values in ([0, label], torch.tensor([0, label])):
            for drop in (None, torch.tensor([True, False])):
                with pytest.raises(UserError, match=rf"{label} .*'kind'.* num_classes=5 .*0 to 4"):
                    conditioner({"kind": values}, drop)
        assert conditioner({"kind": [0, 4]}).batch_size == 2  # the null label may be asked for
        assert conditioner.unconditional(3).batch_size == 3


def test_slice_picks_samples_of_every_slot():
    whole = everything()
    part = whole[1:]
    assert part.batch_size == 1
    assert torch.equal(part.context, whole.context[1:]) and torch.equal(part.vector, whole.vector[1:])


def test_to_converts_what_is_floating_only():
    half = everything().to(dtype=torch.float16)
    assert (half.concat.dtype, half.context.dtype, half.vector.dtype) == (torch.float16, torch.float16, torch.int64)


def test_empty_has_no_batch_size():
    with pytest.raises(ValueError, match="without any slot"):
        _ = Conditioning().batch_size


def test_stack_is_batch_wise():
    a, b = everything(), everything()
    both = Conditioning.stack([a, b])
    assert both.batch_size == 2 * B
    torch.testing.assert_close(both[B:].concat, b.concat)


def test_stack_needs_the_same_slots():
    with pytest.raises(UserError, match="different slots"):
        Conditioning.stack([everything(), Conditioning(context=torch.randn(B, 5, 8))])


def test_join_is_channel_wise_and_token_wise():
    a = Conditioning(torch.randn(B, 3, 4, 4), torch.randn(B, 5, 8))
    b = Conditioning(torch.randn(B, 1, 4, 4), torch.randn(B, 2, 8), torch.tensor([1, 2]))
    joined = a.join(b)
    torch.testing.assert_close(joined.concat, torch.cat([a.concat, b.concat], 1))
    torch.testing.assert_close(joined.context, torch.cat([a.context, b.context], 1))
    assert torch.equal(joined.vector, b.vector)
    with pytest.raises(UserError, match="slot vector"):
        b.join(b)


def test_pictures_of_one_pixel_take_the_size_of_the_others():
    joined = Conditioning(torch.zeros(B, 3, 1, 1)).join(Conditioning(torch.ones(B, 1, 4, 4)))
    assert joined.concat.shape == (B, 4, 4, 4)
    with pytest.raises(UserError, match="differ in size"):
        Conditioning(torch.zeros(B, 3, 2, 2)).join(Conditioning(torch.ones(B, 1, 4, 4)))


def joint(**options) -> JointConditioner:
    label = ClassConditioner(5, 8, null_label=4, drop_rate=0.2)
    return JointConditioner(label=label, picture=ImageConditioner("x", drop_rate=0.1), **options)


def uniform():
    return partial(torch.rand, generator=torch.Generator().manual_seed(0))


def test_joint_drops_independently_or_together():
    n = 4000
    drop = joint().draw_drop(n, uniform()).float()
    assert drop.shape == (n, 2)
    torch.testing.assert_close(drop.mean(0), torch.tensor([0.2, 0.1]), atol=0.03, rtol=0)
    assert abs(drop.prod(1).mean() - 0.02) < 0.01
    together = joint(drop_rate=0.5).draw_drop(n, uniform()).float()
    assert together.prod(1).mean() > 0.45


def test_joint_drops_the_condition_whose_column_says_so():
    conditioner = joint().eval()
    batch = {"class_label": torch.tensor([0, 1]), "x": torch.ones(B, 3, 4, 4)}
    result = conditioner(batch, torch.tensor([[True, False], [False, True]]))
    null = conditioner.unconditional(B)
    torch.testing.assert_close(result.context[0], null.context[0])
    assert not torch.allclose(result.context[1], null.context[1])
    assert result.concat[0].all() and not result.concat[1].any()
    every = conditioner(batch, torch.tensor([True, True]))
    torch.testing.assert_close(every.context, null.context)
    assert not every.concat.any()


def test_joint_needs_a_part_and_a_probability():
    with pytest.raises(UserError, match="at least one"):
        JointConditioner()
    with pytest.raises(UserError, match="drop_rate is -1"):
        joint(drop_rate=-1)


def test_joint_is_trainable_if_a_part_is():
    assert joint().trainable
    assert not JointConditioner(picture=ImageConditioner("x")).trainable


def network(**options) -> ConditionalNetwork:
    torch.manual_seed(0)
    unet = tiny.unet(4, options.pop("extra", 0), attention_factors=(2,), channel_mult=(1, 2), **options)
    torch.nn.init.normal_(unet.out[2].weight)
    return ConditionalNetwork(unet).eval()


def test_network_without_condition_is_the_network():
    model, x, t = network(), torch.randn(B, 4, 8, 8), torch.tensor([3, 500])
    torch.testing.assert_close(model(x, t), model.diffusion_model(x, t))
    assert all(name.startswith("diffusion_model.") for name in model.state_dict())


def test_network_concatenates_after_the_latent():
    model, x, t = network(extra=3), torch.randn(B, 4, 8, 8), torch.tensor([3, 500])
    picture = torch.randn(B, 3, 8, 8)
    expected = model.diffusion_model(torch.cat([x, picture], 1), t)
    torch.testing.assert_close(model(x, t, Conditioning(picture)), expected)
    zeros = model(x, t, Conditioning(torch.zeros(B, 3, 1, 1)))
    torch.testing.assert_close(zeros, model(x, t, Conditioning(torch.zeros(B, 3, 8, 8))))


def test_network_passes_context_and_labels():
    x, t = torch.randn(B, 4, 8, 8), torch.tensor([3, 500])
    model, context = network(context_dim=12), torch.randn(B, 5, 12)
    torch.testing.assert_close(model(x, t, Conditioning(context=context)), model.diffusion_model(x, t, context=context))
    model, y = network(num_classes=6), torch.tensor([0, 5])
    torch.testing.assert_close(model(x, t, Conditioning(vector=y)), model.diffusion_model(x, t, y=y))


def test_network_refuses_a_picture_of_another_size():
    with pytest.raises(UserError, match="16 x 16.* 8 x 8"):
        network(extra=3)(torch.randn(B, 4, 8, 8), torch.tensor([1, 2]), Conditioning(torch.randn(B, 3, 16, 16)))


def test_embeddings_of_one_token_get_their_axis():
    conditioner = EmbeddingConditioner("clip", 8)
    value = torch.randn(B, 8)
    torch.testing.assert_close(conditioner({"clip": value}).context, value[:, None])
    assert conditioner.unconditional(B).context.shape == (B, 1, 8)


def test_label_mistakes_are_told():
    for options, message in [
        ({"null_label": 10}, "null_label is 10"),
        ({"drop_rate": 0.1}, "drop_rate needs null_label"),
        ({"slot": "vector"}, "give embed_dim with slot context"),
        ({"slot": "concat"}, "cannot be concatenated"),
        ({"slot": "adm"}, "slot 'adm' is unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            ClassConditioner(10, 8, **options)
    with pytest.raises(UserError, match="without null_label"):
        ClassConditioner(10, 8).unconditional(1)


def test_labels_for_the_network_stay_labels():
    conditioner = ClassConditioner(10, slot="vector", null_label=9)
    assert conditioner({"class_label": [3, 4]}, torch.tensor([False, True])).vector.tolist() == [3, 9]
    assert not conditioner.state_dict()
