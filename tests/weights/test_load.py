"""Checkpoints: formats, files that are none, raw and averaged weights, what does not fit."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import autoencoder, autoencoder_training, latent_diffusion, unet
from torch import nn

from ldm.errors import UserError
from ldm.training.ema import ExponentialMovingAverage
from ldm.weights.audit import read_torch
from ldm.weights.load import choose, load_into, locate, read


def state(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Make a state dict of consecutive numbers; `__` in a name stands for a dot."""
    names = [name.replace("__", ".") for name in shapes]
    sizes = [torch.Size(shape) for shape in shapes.values()]
    return {name: torch.arange(float(size.numel())).view(size) for name, size in zip(names, sizes, strict=True)}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


WEIGHTS = state(model__weight=(3, 2), model__bias=(3,))
LEGACY, ZIP = pytest.param(False, id="legacy"), pytest.param(True, id="zip")


# ------------------------------------------------------------------------------------------------------------ formats


class ForeignCallback:
    """Stands for a class that is pickled into a checkpoint and may not exist where it is read."""

    constructed = 0

    def __init__(self, best: float = 0.5) -> None:
        type(self).constructed += 1
        self.best = best

    def __reduce__(self):
        return (ForeignCallback, (0.1,), {"best": self.best})


class ForeignMapping(dict):
    """A mapping of a foreign class, filled item by item when it is unpickled."""


class ForeignList(list):
    """A list of a foreign class, likewise."""


@pytest.mark.parametrize("zipped", [LEGACY, ZIP])
def test_torch_formats(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "state_dict": OrderedDict(WEIGHTS)}, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path), WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [LEGACY, ZIP])
def test_published_form_with_pickled_classes_beside_the_weights(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "model.ckpt"
    content = {
        "callbacks": {ForeignCallback: {"best_model_score": torch.tensor(1.0), "self": ForeignCallback()}},
        "hyper_parameters": ForeignMapping(a=ForeignList([1, {2}, frozenset([3]), Path("x"), np.float64(0.5), 1j])),
        "tokenizer": {("a", "b"): 0, frozenset([1]): [], torch.float16: b"bytes", Path("x"): np.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "state_dict": OrderedDict({**WEIGHTS, "parameter": nn.Parameter(torch.ones(2))}),
        "pytorch-lightning_version": "1.4.2",
    }
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    before = ForeignCallback.constructed
    assert same(read(path), {**WEIGHTS, "parameter": torch.ones(2)})
    assert ForeignCallback.constructed == before


def test_half_precision_integers_and_views_survive_the_restricted_reader(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    weights = {"half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(7), "view": base[2:8].view(2, 3).t()}
    torch.save({"state_dict": weights, "callback": ForeignCallback()}, tmp_path / "a.ckpt")
    got = read(tmp_path / "a.ckpt")
    assert same(got, weights)
    assert got["half"].dtype == torch.bfloat16


def test_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    save_file(WEIGHTS, tmp_path / "without_suffix")
    assert same(read(tmp_path / "model.safetensors"), WEIGHTS)
    assert same(read(tmp_path / "without_suffix"), WEIGHTS)


def test_a_bare_state_dict_is_read_and_what_is_no_tensor_is_skipped(tmp_path: Path, caplog) -> None:
    torch.save({**WEIGHTS, "note": "text"}, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt"), WEIGHTS)
    assert "note" in caplog.text


def test_run_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": WEIGHTS}, tmp_path / "checkpoints" / "last.ckpt")
    assert locate(tmp_path) == tmp_path / "checkpoints" / "last.ckpt"
    assert same(read(str(tmp_path)), WEIGHTS)


# ------------------------------------------------------------------------------------------- files that cannot be read


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.ckpt"
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS}, buffer, _use_new_zipfile_serialization=kind != "truncated_legacy")
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("model: 1\n")
    elif kind == "plain_pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}}))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "torchscript":
        torch.jit.script(nn.Linear(1, 1)).save(str(path))
    elif kind == "no_state":
        torch.save([1, 2], path)
    elif kind == "safetensors":
        path.write_bytes(struct.pack("<Q", 400) + b'{"a":')
    elif kind.startswith("truncated"):
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "no such checkpoint"),
        ("folder", "holds no checkpoint"),
        ("empty", "is empty"),
        ("text", "is not a checkpoint"),
        ("plain_pickle", "is not a checkpoint"),
        ("zip", "not a checkpoint"),
        ("torchscript", "program"),
        ("no_state", "no state dict"),
        ("safetensors", "truncated"),
        ("truncated_zip", "truncated"),
        ("truncated_legacy", "truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_file_that_is_no_checkpoint_gives_one_clear_line(tmp_path: Path, kind: str, says: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match=says) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- raw or averaged


def test_choose() -> None:
    raw = state(model__diffusion_model__out__weight=(2,), first_stage_model__decoder__weight=(2,), betas=(3,))
    average = {"model_ema.diffusion_modeloutweight": torch.tensor([5.0, 6.0])}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    both = raw | average | counters
    assert same(choose(both, "raw"), raw)
    assert same(choose(both, "ema"), raw | {"model.diffusion_model.out.weight": torch.tensor([5.0, 6.0])})
    assert same(choose(raw, "ema"), raw)
    flat = state(encoder__weight=(2,)) | {"model_ema.encoderweight": torch.tensor([7.0, 8.0])}
    assert same(choose(flat, "ema"), {"encoder.weight": torch.tensor([7.0, 8.0])})
    with pytest.raises(UserError, match="raw or ema"):
        choose(raw, "average")


# ------------------------------------------------------------------------------------------------------------ loading


class Model(nn.Module):
    """Two parts, the way a diffusion model has them."""

    def __init__(self, width: int = 3, ema: bool = False) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": nn.Linear(2, width)})
        self.first_stage_model = nn.Linear(2, 2)
        if ema:
            self.model_ema = ExponentialMovingAverage(self.model)


def test_load_is_strict_and_reports_by_part_before_changing_anything() -> None:
    module, other = Model(), Model(width=4)
    given = other.state_dict()
    del given["first_stage_model.bias"]
    given["cond_stage_model.x"] = torch.ones(1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_into(module, given)
    assert str(caught.value) == (
        "state dict: does not fit Model: first_stage_model: 1 missing (first_stage_model.bias); "
        "cond_stage_model: 1 unexpected (cond_stage_model.x); model.diffusion_model: 2 of another shape "
        "(model.diffusion_model.weight (4, 2) in the file, (3, 2) here, "
        "model.diffusion_model.bias (4) in the file, (3) here)"
    )
    assert same(module.state_dict(), before)


def test_load_without_strictness_takes_what_fits(caplog) -> None:
    module, other = Model(), Model(width=4)
    report = load_into(module, other.state_dict(), strict=False)
    assert not report.fits and len(report.mismatched) == 2
    assert torch.equal(module.first_stage_model.weight, other.first_stage_model.weight)
    assert "another shape" in caplog.text


def test_load_ignores_prefixes_and_their_averages() -> None:
    module, other = Model(ema=True), Model(width=4, ema=True)
    report = load_into(module, other.state_dict(), ignore=["model.diffusion_model"])
    assert report.fits
    assert set(report.loaded) == {"first_stage_model.weight", "first_stage_model.bias", *_counters()}


def _counters() -> set[str]:
    return {"model_ema.decay", "model_ema.num_updates"}


def test_an_average_that_the_file_lacks_starts_at_the_weights() -> None:
    module, other = Model(ema=True), Model()
    report = load_into(module, other.state_dict())
    assert report.fits and set(report.tolerated) == _counters()
    assert torch.equal(module.model_ema.diffusion_modelweight, other.model.diffusion_model.weight)


def test_what_released_checkpoints_hold_beside_the_model_is_tolerated_and_reported() -> None:
    module, extra = Model(), {
        "model_ema.decay": torch.ones(()),
        "loss.logvar": torch.ones(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.ones(1),
    }  # fmt: skip
    report = load_into(module, Model().state_dict() | extra)
    assert report.fits and set(report.tolerated) == set(extra)


def test_a_module_under_two_names_is_filled_by_either() -> None:
    module = Model()
    module.cond_stage_model = module.first_stage_model
    other = Model()
    assert load_into(module, other.state_dict()).fits
    assert torch.equal(module.cond_stage_model.weight, other.first_stage_model.weight)


def test_load_from_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": WEIGHTS}, path)
    with pytest.raises(UserError, match="a.ckpt: .*Model"):
        load_into(Model(), path)


# ----------------------------------------------------------------------------------------- files as people have them


def test_tables_that_a_file_lacks_follow_from_the_config() -> None:
    model, other = latent_diffusion(unet(), autoencoder(0)).model, latent_diffusion(unet(), autoencoder(1)).model
    given = other.state_dict()
    without = {name: value for name, value in given.items() if name not in other.table_names}
    assert len(given) - len(without) == 12
    report = load_into(model, without)
    assert report.fits and set(report.tolerated) == set(other.table_names)
    assert same(model.state_dict(), given)
    assert load_into(model, without | {"alphas_cumprod": given["alphas_cumprod"].half()}).fits
    with pytest.raises(UserError, match="11 missing"):  # they would be those of another schedule
        load_into(model, without | {"betas": given["betas"] * 1.1})


def test_a_first_stage_is_taken_out_of_a_full_checkpoint_also_for_its_training() -> None:
    whole, training = latent_diffusion(unet(), autoencoder(1)), autoencoder_training(0, ema_decay=0.9)
    given = whole.state_dict() | {"logvar": torch.zeros(1), "model_ema.decay": torch.tensor(0.5)}
    assert load_into(training, given, ignore=["loss"]).fits
    name = "encoder.conv_in.weight"
    assert torch.equal(training.state_dict()[name], given[f"first_stage_model.{name}"])


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("a diffusers file (U-Net)", "down_blocks.0.resnets.0.conv1.weight"),
        ("a diffusers file (autoencoder)", "encoder.down_blocks.0.resnets.0.conv1.weight"),
        ("a diffusers file (transformer)", "transformer_blocks.0.attn1.to_q.weight"),
        ("an adapter (LoRA)", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        ("an adapter (LoRA)", "base_model.model.down_blocks.0.to_q.lora_A.weight"),
        ("a ControlNet", "control_model.input_blocks.0.0.weight"),
        ("a CLIP text model", "text_model.embeddings.token_embedding.weight"),
        ("Stable Diffusion 2", "cond_stage_model.model.transformer.resblocks.0.ln_1.weight"),
        ("Stable Diffusion XL", "conditioner.embedders.1.model.ln_final.weight"),
        ("Stable Diffusion XL", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
        ("an OpenCLIP model", "visual.conv1.weight"),
        ("a DiT or SiT", "blocks.0.adaLN_modulation.1.weight"),
        ("a torchvision network", "layer1.0.conv1.weight"),
        ("DataParallel", "module.model.diffusion_model.out.weight"),
        ("an autoencoder", "encoder.conv_in.weight"),
    ],
)
def test_a_foreign_file_is_called_by_its_name(tmp_path: Path, says: str, name: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(2), **{f"{name}{i}": torch.ones(1) for i in range(500)}}, path)
    with pytest.raises(UserError) as caught:
        load_into(Model(), path)
    assert f"is {says}" in str(caught.value) or says in str(caught.value)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) <= 300


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "n" * 9999, "\u202e", "a.b" * 99, "", "model.diffusion_model"])
@pytest.mark.parametrize("number", [1, 2, 500])
def test_names_of_tensors_are_written_out_and_shortened(name: str, number: int) -> None:
    given = Model().state_dict() | {f"{name}{i}": torch.ones((1,) * 60) for i in range(number)}
    given["first_stage_model.weight"] = torch.ones((1,) * 60)
    with pytest.raises(UserError) as caught:
        load_into(Model(), given)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300
    assert f"{number} unexpected" in str(caught.value) or number == 2


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.mark.parametrize("zipped", [LEGACY, ZIP])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    base = torch.arange(24)
    content = {f"{dtype}": base.to(dtype).view(2, 3, 4) for dtype in DTYPES}
    content |= {"transposed": base.view(4, 6).t()[1:], "empty": base[:0], "scalar": base.sum(), "shared": base[3:5]}
    content |= {"parameter": nn.Parameter(torch.ones(3)), "expanded": base[:1].expand(7), "shape": base[None].shape}
    content |= {"plain": [1, -(2**70), 2.5, None, True, "a", (1, (2,)), {"a": {3: b"bytes"}}], "type": torch.half}
    if protocol < 3:  # in which bytes are the call of a codec
        content["plain"][-1] = {"a": {3: "text"}}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": content}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for resumed in (False, True):
        got = read_torch(path, resumed)["state_dict"]
        assert got.keys() == content.keys()
        for name, value in content.items():
            if not isinstance(value, torch.Tensor):
                assert got[name] == value and type(got[name]) is type(value)
            else:
                assert got[name].dtype == value.dtype and got[name].stride() == value.stride()
                assert as_bytes(got[name]) == as_bytes(value)
        assert got["shared"].untyped_storage().data_ptr() == got["transposed"].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody/a.ckpt", ""])
def test_a_path_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        read(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


def test_complex_numbers_are_no_weights(tmp_path: Path) -> None:
    """Of them only a half would be copied."""
    layer = nn.Linear(2, 2)
    torch.save({name: value.to(torch.complex64) for name, value in layer.state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="of another shape .*of complex numbers in the file"):
        load_into(layer, tmp_path / "a.pt")
