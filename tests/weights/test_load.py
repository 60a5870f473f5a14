"""Checkpoints: formats, files that are none, raw and averaged weights, what does not fit."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import UserError
from ldm.training.ema import ExponentialMovingAverage
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


@pytest.mark.parametrize("zipped", [LEGACY, ZIP])
def test_published_form_with_pickled_classes_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    content = {
        "callbacks": {ForeignCallback: {"best_model_score": torch.tensor(1.0), "self": ForeignCallback()}},
        "hyper_parameters": ForeignMapping(a=ForeignList([1, {2}, Path("x")])),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "state_dict": OrderedDict({**WEIGHTS, "parameter": nn.Parameter(torch.ones(2))}),
        "pytorch-lightning_version": "1.4.2",
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
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
