"""LoRA and DoRA: what they change, what is merged, names in files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm import config
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.saving import save_adapter
from ldm.weights.adapters import Adapter, DoRA, LoRA, adapter_in, folded, is_of_adapter
from ldm.weights.load import load_into

KINDS = [LoRA, DoRA]
LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "1d": (nn.Conv1d(6, 4, 1), (2, 6, 5)),
    "2d, strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9)),
    "2d, dilated": (nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False), (2, 4, 7, 9)),
    "3d": (nn.Conv3d(4, 4, 3, padding=1), (1, 4, 3, 4, 5)),
}


def network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(type(layer)(**options(layer)))


def options(layer: nn.Module) -> dict[str, Any]:
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": has_bias}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(layer, name) for name in names} | {"bias": has_bias}


def shaken(model: nn.Module) -> nn.Module:
    """Give the adapter of a model other values than its first."""
    for name, parameter in model.named_parameters():
        if is_of_adapter(name):
            nn.init.normal_(parameter.detach(), mean=1.0 if "magnitude" in name else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_begins_changes_nothing_and_a_merged_one_is_the_same_as_beside(kind: type, layer: str) -> None:
    model, x = network(LAYERS[layer][0]), torch.randn(LAYERS[layer][1])
    plain = model(x)
    assert kind(["*"], rank=2, alpha=3.0).attach(model) == ["0"]
    assert torch.equal(model(x), plain)
    beside = shaken(model)(x)
    assert (beside - plain).abs().max() > 0.01
    beside.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if is_of_adapter(name))
    merged = network(LAYERS[layer][0])
    merged.load_state_dict(folded(model.state_dict(), "a run"))
    torch.testing.assert_close(merged(x), beside, atol=1e-6 * beside.abs().max().item(), rtol=0)


def tiny_model(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    section = tiny.latent_diffusion_config(**_PARTS)["params"]["model"]
    model = config.instantiate(section).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter.detach(), std=0.1)
    model.config = section
    return model


_PARTS = {
    "network": tiny.unet_config(attention_factors=[1]),
    "autoencoder": tiny.autoencoder_config(),
}
CHOSEN = ["*.qkv", "*.proj_out", "*.emb_layers.1", "*.in_layers.2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_the_names_of_diffusers_and_is_merged_back(kind: type, tmp_path: Path) -> None:
    """Queries, keys and values, which are one layer here, are three there."""
    trained, base = tiny_model(), tiny_model()
    assert len(kind(CHOSEN, rank=3, alpha=2.0).attach(trained.model)) == 18
    shaken(trained)
    file = save_adapter(tmp_path / "a", adapter_in(trained.state_dict(), "a run"), trained.config)
    names = load_file(file)
    assert "unet.mid_block.attentions.0.to_k.lora_A.weight" in names and all(name.startswith("unet.") for name in names)
    base.load_adapter(str(file))
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([3.0, 7.0])
    torch.testing.assert_close(base.model(x, t), trained.model(x, t), atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="merged into this model already"):
        base.load_adapter(f"{file}:0.5")


def test_a_share_and_several(tmp_path: Path) -> None:
    trained, base, half = tiny_model(), tiny_model(), tiny_model()
    LoRA(CHOSEN, rank=2).attach(trained.model)
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(save_adapter(tmp_path / str(seed), adapter_in(shaken(trained).state_dict(), "run"), base.config))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    base.load_adapter(f"{files[0]}")
    half.load_adapter(f"{files[0]}:0.5")
    for name, value in half.state_dict().items():
        torch.testing.assert_close(value, (before[name] + base.state_dict()[name]) / 2)
    half.load_adapter(f"{files[1]}:-2")
    assert len(half.adapters) == 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    LoRA(CHOSEN, rank=2).attach(model.model)
    state = adapter_in(shaken(model).state_dict(), "a run")
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", state, model.config)


MISTAKES = {  # what happens to the entries of a good file: words of the message
    "another name": (lambda s: {n.replace("mid_block", "middle"): v for n, v in s.items()}, "another base.*middle"),
    "another width": (lambda s: {n: v[:, :-1] if "conv1.lora_A" in n else v for n, v in s.items()},
                      "another base.*conv1.*inputs.*its weight is"),
    "half a pair": (lambda s: {n: v for n, v in s.items() if not n.endswith("to_q.lora_B.weight")}, "to_q.*pair"),
    "other ranks": (lambda s: {n: v[:, :1] if n.endswith("to_q.lora_B.weight") else v for n, v in s.items()},
                    "to_q.*pair"),
    "not finite": (lambda s: {name: v * float("nan") for name, v in s.items()}, "not finite"),
    "another kind": (lambda s: {"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "no LoRA or DoRA.*lokr_w1"),
    "more": (lambda s: s | {"unet.conv_in.bias": torch.ones(2)}, "no LoRA or DoRA.*conv_in.bias"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_of_another_base_and_broken_ones_are_refused_by_name(mistake: str, file: Path, tmp_path: Path) -> None:
    change, words = MISTAKES[mistake]
    entries = {name: value.clone().contiguous() for name, value in change(load_file(file)).items()}
    save_file(entries, tmp_path / "b.safetensors")
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"b\.safetensors.*{words}") as refused:
        model.load_adapter(str(tmp_path / "b.safetensors"))
    assert len(str(refused.value)) <= 300
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and not model.adapters


def test_one_that_is_no_share_and_absent_files_are_refused(file: Path) -> None:
    for given, words in ((f"{file}:nan", "no share"), (f"{file}:x", "no such checkpoint"), ("absent:1", "absent")):
        with pytest.raises(UserError, match=words):
            tiny_model().load_adapter(given)


def test_spellings_of_kohya_and_alphas_of_files(file: Path, tmp_path: Path) -> None:
    entries, ours, theirs = load_file(file), tiny_model(), tiny_model()
    other = {}
    for name, value in entries.items():
        layer, _, kind = name.partition(".lora_")
        flat = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        other[f"{flat}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = value.clone()
        other[f"{flat}.alpha"] = torch.tensor(1.0)  # half of the rank
    save_file(other, tmp_path / "kohya.safetensors")
    save_file(entries, tmp_path / "peft.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.r": 2}'})
    ours.load_adapter(f"{file}:0.5")
    for name in ("kohya", "peft"):
        theirs = tiny_model()
        theirs.load_adapter(str(tmp_path / f"{name}.safetensors"))
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(value, ours.state_dict()[key])


def test_what_is_merged_is_known_to_a_file_of_the_model(file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.load_adapter(str(file))
    saved = model.save_pretrained(tmp_path / "whole.safetensors")
    again = LatentDiffusion.from_pretrained(saved)
    with pytest.raises(UserError, match="merged into this model already"):
        again.load_adapter(str(file))
    with pytest.raises(UserError, match="merged into this model already"):
        LatentDiffusion.from_pretrained(saved, adapters=[f"{file}:0.3"])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LoRA(["*.qkvv"]), r"'\*\.qkvv' matches no .*did you mean \*\.qkv\?"),
        (LoRA(["*.qkv", "*.norm"]), r"'\*\.norm' matches no linear layer or convolution"),
        (LoRA(["*.qkv"], rank=33), r"rank: 33 is more than 32, that of .*qkv"),
    ],
)
def test_layers_that_cannot_have_one_are_refused_by_name(adapter: LoRA, words: str) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    with pytest.raises(UserError, match=words):
        adapter.attach(model.model)
    assert names == list(model.state_dict())


def test_a_second_one_on_a_layer_is_refused() -> None:
    model = tiny_model()
    LoRA(["*.qkv"]).attach(model)
    with pytest.raises(UserError, match="qkv has an adapter already"):
        DoRA(["*.qkv"]).attach(model)


def test_an_adapter_as_the_weights_of_a_model_is_told(file: Path) -> None:
    with pytest.raises(UserError, match="is an adapter.*--adapter"):
        load_into(tiny_model(), file)


@pytest.mark.slow  # importing diffusers takes longer than all of these
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_the_file_and_gives_the_same_output(kind: type, clip_folder: Path, tmp_path: Path) -> None:
    """The pipeline's own `load_lora_weights`, which peft does: linear layers, convolutions, and the text model."""
    pytest.importorskip("peft")
    import diffusers
    import diffusers_models as models

    section = models.with_clip(clip_folder)
    text = section["params"]["conditioner"]["params"]
    text["trainable"] = True
    folder, base = models.folder_of(section, tmp_path / "folder")
    trained = models.build(section)
    trained.model.requires_grad_(True)
    trained.cond_stage_model.requires_grad_(True)
    layers = ["*.attn?.to_?", "*.attn2.to_out.0", "*.proj_in", "*.net.2", "*.in_layers.2", "*.op"]
    of_text = ["*.q_proj", "*.fc1"] if kind is LoRA else []  # of DoRA transformers reads no magnitudes
    kind([*layers, *of_text], rank=2, alpha=3.0).attach(trained)
    shaken(trained)
    file = save_adapter(tmp_path / "adapter", adapter_in(trained.state_dict(), "a run"), section)
    assert {name.partition(".")[0] for name in load_file(file)} == {"unet", *["text_encoder"] * bool(of_text)}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file)
    x, t, texts = torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), ["a red circle", "a blue square"]
    with torch.no_grad():
        context = trained.cond_stage_model.embed(texts)
        ids = trained.cond_stage_model.tokenizer(texts)
        for ours, theirs, plain in (
            (context, pipe.text_encoder(ids)[0], base.cond_stage_model.embed(texts)),
            (trained.model.diffusion_model(x, t, context), pipe.unet(x, t, context).sample,
             base.model.diffusion_model(x, t, context)),
        ):  # fmt: skip
            assert not of_text or (ours - plain).abs().max() > 0.01 * plain.abs().max()
            torch.testing.assert_close(theirs, ours, atol=1e-5 * ours.abs().max().item(), rtol=0)
    merged = LatentDiffusion.from_pretrained(folder, adapters=[str(file)])
    torch.testing.assert_close(merged.cond_stage_model.embed(texts), context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.model.diffusion_model(x, t, context), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_one_of_stable_diffusion_xl(
    kind: type, clip_folder: Path, open_clip_folder: Path, tmp_path: Path
) -> None:
    """Linear projections, blocks of several transformers, sizes as a vector; the file is merged here, too."""
    pytest.importorskip("peft")
    import diffusers
    import diffusers_models as models

    section = models.sdxl(clip_folder, open_clip_folder)
    folder, base = models.folder_of(section, tmp_path / "folder")
    trained = models.build(section)
    trained.model.requires_grad_(True)
    kind(["*.attn?.to_?", "*.attn2.to_out.0", "*.proj_in", "*.net.2", "*.in_layers.2"], rank=2).attach(trained.model)
    shaken(trained)
    file = save_adapter(tmp_path / "adapter", adapter_in(trained.state_dict(), "a run"), section)
    assert any("transformer_blocks.1." in name for name in load_file(file))  # the second one of a block
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file)
    x, t, texts = torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), ["a red circle", "a blue square"]
    batch = {"caption": texts, **trained.entries_for((models.SIDE, models.SIDE), 2)}
    with torch.no_grad():
        condition = trained.cond_stage_model(batch)
        ours, plain = (
            one.model.diffusion_model(x, t, condition.context, y=condition.vector) for one in (trained, base)
        )
        context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        side = models.SIDE
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        theirs = pipe.unet(x, t, context, added_cond_kwargs=added).sample
        assert (ours - plain).abs().max() > 0.01 * plain.abs().max()
        torch.testing.assert_close(theirs, ours, atol=1e-5 * ours.abs().max().item(), rtol=0)
        merged = LatentDiffusion.from_pretrained(folder, adapters=[str(file)])
        again = merged.model.diffusion_model(x, t, condition.context, y=condition.vector)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-5)


ODD = {
    "no sides": {"lora_A": torch.tensor(1.0)},
    "one side": {"lora_A": torch.ones(3)},
    "empty": {"lora_A": torch.ones(3, 0)},
    "another rank": {"lora_B": torch.ones(4, 2)},
    "no pair": {"lora_B": None},
    "not finite": {"lora_A": torch.full((3, 6), torch.nan)},
    "not finite in 8 bits": {"lora_A": torch.full((3, 6), torch.nan).to(torch.float8_e5m2)},
    "alpha that is none": {"alpha": torch.tensor(torch.inf)},
    "alphas": {"alpha": torch.ones(2)},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_factors_are_refused_by_the_name_of_their_layer(name: str) -> None:
    parts = {"lora_A": torch.ones(3, 6), "lora_B": torch.ones(4, 3)} | ODD[name]
    state = {f"0.{key}" + ("" if key == "alpha" else ".weight"): value for key, value in parts.items()}
    with pytest.raises(UserError, match="a.safetensors: .*0") as caught:
        Adapter.of({key: value for key, value in state.items() if value is not None}, "a.safetensors", strict=True)
    assert str(caught.value).isprintable()
