"""What every backbone keeps to: those of ldm.networks, and a tiny transformer that is none of the library's."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import Tensor, nn

import ldm.networks
from ldm.errors import UserError
from ldm.models.conditional_network import check_fit
from ldm.networks.backbone import Backbone, ShowsHidden, as_backbone
from ldm.networks.dit import DiT
from ldm.networks.embeddings import timestep_embedding
from ldm.networks.transformer import TransformerLayers
from ldm.networks.unet import UNet

B, SIDE, CONTEXT_DIM, NUM_CLASSES = 2, 8, 6, 5


class PatchTransformer(nn.Module):
    """A backbone in twenty lines that inherits nothing from Backbone: a transformer over 2 x 2 patches."""

    def __init__(self, in_channels: int, out_channels: int, context_dim: int, num_classes: int, dim: int = 32) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.size_multiple = in_channels, out_channels, 2
        self.context_dim, self.num_classes = context_dim, num_classes
        self.patches = nn.Conv2d(in_channels, dim, 2, stride=2)
        self.context, self.labels = nn.Linear(context_dim, dim), nn.Embedding(num_classes, dim)
        self.layers = TransformerLayers(dim, depth=2, num_heads=2, head_channels=16)
        self.out = nn.ConvTranspose2d(dim, out_channels, 2, stride=2)

    @property
    def blocks(self) -> list[nn.Module]:
        return self.layers.blocks

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise UserError(f"PatchTransformer: size {tuple(x.shape[2:])} must be a multiple of {self.size_multiple}")
        h = self.patches(x)  # (B, D, H/2, W/2)
        tokens = h.flatten(2).transpose(1, 2) + (timestep_embedding(t, h.shape[1]) + self.labels(y))[:, None]
        tokens = self.layers(torch.cat([tokens, self.context(context)], dim=1))[:, : h[0, 0].numel()]  # (B, N, D)
        return self.out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))


def backbones() -> list[type]:
    """Find the classes of ldm.networks that declare themselves as backbones."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(ldm.networks.__path__, "ldm.networks.")]
    classes = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    return sorted((cls for cls in classes if Backbone in cls.__mro__ and cls is not Backbone), key=str)


def make(cls: type) -> Backbone:
    torch.manual_seed(0)
    condition = {"context_dim": CONTEXT_DIM, "num_classes": NUM_CLASSES}
    match cls.__name__:
        case "UNet":
            network = UNet(7, 4, 32, 1, (1, 2), (1, 2), num_heads=2, **condition)
        case "DiT":
            network = DiT(7, 4, SIDE, 2, 32, 2, num_heads=2, **condition)
        case "PatchTransformer":
            network = PatchTransformer(7, 4, **condition)
        case name:
            raise NotImplementedError(f"{name} is new: make a small one with 7 to 4 channels here")
    with torch.no_grad():
        for parameter in network.parameters():  # zero-initialised layers take part
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, 7, SIDE, SIDE, generator=generator)
    context = torch.randn(B, 3, CONTEXT_DIM, generator=generator)
    return {"x": x, "t": torch.tensor([3, 700]), "context": context, "y": torch.tensor([0, 4])}


every_backbone = pytest.mark.parametrize("cls", [*backbones(), PatchTransformer])


def test_the_library_has_backbones():
    assert {UNet, DiT} <= set(backbones())


@every_backbone
def test_it_says_what_it_takes(cls):
    network = as_backbone(make(cls))
    assert (network.in_channels, network.out_channels) == (7, 4)
    assert (network.context_dim, network.num_classes) == (CONTEXT_DIM, NUM_CLASSES)
    assert SIDE % network.size_multiple == 0


@every_backbone
def test_the_prediction_has_the_size_and_dtype_of_x(cls):
    network, given = make(cls), inputs()
    assert network(**given).shape == (B, 4, SIDE, SIDE)
    assert network(**given | {"x": given["x"].half().float()}).dtype == torch.float32
    side = network.size_multiple
    assert network(**given | {"x": torch.randn(B, 7, 3 * side, side)}).shape == (B, 4, 3 * side, side)


@every_backbone
def test_times_may_be_integers_or_fractions(cls):
    network, given = make(cls), inputs()
    whole = network(**given)
    torch.testing.assert_close(network(**given | {"t": given["t"].float()}), whole)
    assert not torch.equal(network(**given | {"t": given["t"] + 0.5}), whole)


@every_backbone
@pytest.mark.parametrize("name", ["x", "t", "context", "y"])
def test_each_input_counts_for_its_own_sample_only(cls, name):
    network, given = make(cls), inputs()
    changed = given | {name: given[name].clone()}
    changed[name][1] = given[name][0]
    before, after = network(**given), network(**changed)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-5)


@every_backbone
def test_other_sizes_are_refused(cls):
    network, given = make(cls), inputs()
    if network.size_multiple > 1:
        with pytest.raises(UserError, match=f"multiple of {network.size_multiple}"):
            network(**given | {"x": torch.randn(B, 7, SIDE + 1, SIDE)})


@every_backbone
def test_blocks_are_parts_that_share_nothing_and_hold_most_weights(cls):
    network = make(cls)
    modules = set(network.modules())
    parameters = [parameter for block in network.blocks for parameter in block.parameters()]
    assert modules.issuperset(network.blocks)
    assert len(set(map(id, parameters))) == len(parameters)
    assert 2 * sum(p.numel() for p in parameters) > sum(p.numel() for p in network.parameters())


@every_backbone
def test_blocks_run_in_their_order(cls):
    network, order = make(cls), []
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, i=i: order.append(i))
    network(**inputs())
    assert order == list(range(len(network.blocks)))


@every_backbone
def test_it_fits_into_a_model_or_is_refused_by_name(cls):
    with pytest.raises(UserError, match=f"{cls.__name__}: out_channels is 4.* 3 channels"):
        check_fit(make(cls), 3)


@pytest.mark.parametrize("cls", backbones())
def test_hidden_states_are_those_behind_its_blocks_and_as_large_as_it_says(cls):
    network, given, behind, hidden = make(cls), inputs(), [], []
    before = network(**given)
    for block in network.blocks:
        block.register_forward_hook(lambda *call: behind.append(call[2]))
    assert torch.equal(network(**given, hidden=hidden), before)
    shapes = [(B, shape.channels, SIDE // shape.factor, SIDE // shape.factor) for shape in network.hidden_shapes]
    assert isinstance(network, ShowsHidden) and [tuple(state.shape) for state in hidden] == shapes
    for state, output in zip(hidden, behind, strict=True):
        tokens = output if output.dim() == 3 else output.flatten(2).transpose(1, 2)  # (B, N, C)
        assert torch.equal(state.flatten(2).transpose(1, 2), tokens)
