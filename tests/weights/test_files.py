"""Files of weights: hostile and broken ones are refused before anything is allocated, frozen parts stored once."""

import errno
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.training.lightning_fixes.checkpoints import CheckpointFiles
from ldm.weights import files as storage
from ldm.weights.load import locate, newest, read

WEIGHTS = {"model.weight": torch.arange(6.0).view(3, 2), "first.weight": torch.arange(3.0)}
GIGABYTE = 1 << 30


def saved(path: Path, step: int = 1) -> Path:
    torch.save({"global_step": step, "state_dict": dict(WEIGHTS)}, path)
    return path


def rewritten(source: Path, path: Path, change: Any, **options: Any) -> Path:
    """Copy an archive with the bytes of its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", **options) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hostile(folder: Path, kind: str) -> Path:
    source, path = saved(folder / "good.ckpt"), folder / f"{kind}.ckpt"
    if kind == "zip bomb":
        return rewritten(source, path, lambda program: program + bytes(1 << 22), compression=zipfile.ZIP_DEFLATED)
    if kind == "storage beyond the file":  # K\x06: six elements; J: a number of four bytes
        return rewritten(source, path, lambda program: program.replace(b"K\x06t", b"J\xff\xff\xff\x7ft", 1))
    if kind == "shape beyond the storage":
        return rewritten(source, path, lambda program: program.replace(b"K\x03K\x02\x86", b"K\xffK\xff\x86", 1))
    if kind == "strides beyond the storage":
        return rewritten(source, path, lambda program: program.replace(b"K\x02K\x01\x86", b"K\xffK\xff\x86", 1))
    if kind == "array of bytes":
        torch.save({"state_dict": WEIGHTS, "x": Call(bytearray, 64 * GIGABYTE)}, path)
    elif kind == "memo of gigabytes":
        return rewritten(source, path, lambda program: program[:2] + b"Nr\xff\xff\xff\x7f0" + program[2:])
    elif kind == "legacy storage beyond the file":
        torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"K\x06N", b"J\xff\xff\xff\x7fN", 1))
    elif kind == "header of safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": 1}')
    elif kind == "shape in safetensors":
        path = path.with_suffix(".safetensors")
        header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


KINDS = [
    "zip bomb", "storage beyond the file", "shape beyond the storage", "strides beyond the storage", "array of bytes",
    "memo of gigabytes", "legacy storage beyond the file", "header of safetensors", "shape in safetensors",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_absurd_files_are_refused_before_anything_is_allocated(tmp_path: Path, kind: str) -> None:
    path = hostile(tmp_path, kind)
    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE, limits[1]))
    try:
        if kind == "memo of gigabytes":  # harmless to a reader that keeps its memo in a dict
            assert torch.equal(read(path)["model.weight"], WEIGHTS["model.weight"])
        else:
            for reader in (read, storage.load):
                with pytest.raises(UserError) as caught:
                    reader(path)
                assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
                assert "MemoryError" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_code_is_refused_in_resuming_and_not_run(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    content = {"state_dict": WEIGHTS, "callbacks": Call(os.system, f"touch {canary}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="evil.ckpt"):
        storage.load(path)
    assert not canary.exists()


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"view": base[2:8].view(2, 3).t(), "empty": torch.zeros(0, 3), "scalar": torch.tensor(1, dtype=torch.int8)}
    state |= {"expanded": base[:1].expand(5), "half": base.bfloat16(), "complex": torch.zeros(2, dtype=torch.complex64)}
    for zipped in (False, True):
        torch.save({"state_dict": state}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        got = read(tmp_path / "a.ckpt")
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


def run_folder(folder: Path) -> Path:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    for step in (1, 2, 3):
        storage.write({"global_step": step, "state_dict": WEIGHTS}, checkpoints / "last.ckpt.tmp")
        storage.publish(checkpoints / "last.ckpt.tmp", checkpoints / "last.ckpt", checkpoints / "previous.ckpt")
    return checkpoints


def storage_of_the_run(path: Path) -> dict[str, torch.Tensor]:
    return CheckpointFiles().load_checkpoint(path)["state_dict"]


def steps(checkpoints: Path) -> list[int]:
    return [storage.load(checkpoints / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")]


def test_the_previous_checkpoint_stays_and_is_fallen_back_on(tmp_path: Path, caplog: Any) -> None:
    checkpoints = run_folder(tmp_path)
    assert steps(checkpoints) == [3, 2]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]
    os.truncate(checkpoints / "last.ckpt", 700)
    assert locate(tmp_path) == checkpoints / "previous.ckpt"
    assert "last.ckpt: is truncated" in caplog.text and "using previous.ckpt" in caplog.text
    (checkpoints / "previous.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="no other checkpoint beside it is good"):
        locate(tmp_path)


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path: Path, form: str) -> None:
    path, dice, found = tmp_path / f"a.{form}", random.Random(form), 0
    if form == "zip":
        saved(path)
    else:
        storage.write_safetensors(path, WEIGHTS, {"config": "model: {}"})
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            got = read(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            found += 1
        else:
            assert set(got) == set(WEIGHTS) and all(torch.equal(got[name], WEIGHTS[name]) for name in got)
    assert found > 100


@pytest.mark.parametrize("reader", [read, storage_of_the_run], ids=["weights", "resumed"])
def test_damaged_values_fall_back_with_one_line(tmp_path: Path, caplog: Any, reader: Any) -> None:
    checkpoints = run_folder(tmp_path)
    for name in ("last.ckpt", "previous.ckpt"):
        content = bytearray((checkpoints / name).read_bytes())
        content[content.index(WEIGHTS["model.weight"].numpy().tobytes()) + 7] ^= 1
        (checkpoints / name).write_bytes(content)
        if name == "last.ckpt":
            assert torch.equal(reader(checkpoints / name)["model.weight"], WEIGHTS["model.weight"])
            (record,) = caplog.records
            assert "last.ckpt" in record.message and "CRC" in record.message and "using previous.ckpt" in record.message
            assert newest(tmp_path)[0] == checkpoints / "previous.ckpt"
    with pytest.raises(UserError, match="last.ckpt.*no other checkpoint beside it is good"):
        reader(checkpoints / "last.ckpt")


def test_a_file_that_is_not_whole_is_never_published(tmp_path: Path) -> None:
    checkpoints = run_folder(tmp_path)
    short = saved(checkpoints / "last.ckpt.tmp", 4)
    os.truncate(short, short.stat().st_size - 10)
    with pytest.raises(UserError, match="truncated"):
        storage.publish(short, checkpoints / "last.ckpt", checkpoints / "previous.ckpt")
    assert steps(checkpoints) == [3, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "full.ckpt").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        storage.write({"state_dict": {"a": torch.zeros(1 << 16)}}, tmp_path / "full.ckpt")
    assert caught.value.errno == errno.ENOSPC


def test_what_the_system_says_of_a_failed_write_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, tensors = resource.getrlimit(resource.RLIMIT_FSIZE), {"a": torch.zeros(1 << 16)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for write in (lambda path: storage.write({"state_dict": tensors}, path),
                      lambda path: storage.write_safetensors(path, tensors, {})):  # fmt: skip
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                write(tmp_path / "large")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # where only a library has seen the error
            storage.write_safetensors(tmp_path / "full", tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_frozen_parts_are_stored_once_and_put_back(tmp_path: Path) -> None:
    alias = WEIGHTS | {"second.weight": WEIGHTS["first.weight"]}
    parts = storage.FrozenParts(tmp_path, ["first.weight", "second.weight"])
    for step in (1, 2):
        content = {"global_step": step, "state_dict": dict(alias)}
        parts.take_out(content)
        assert content["state_dict"].keys() == {"model.weight"}
        torch.save(content, tmp_path / f"{step}.ckpt")
    (file,) = tmp_path.glob("frozen-*.safetensors")
    assert all(torch.equal(read(tmp_path / "2.ckpt")[name], value) for name, value in alias.items())
    assert storage.load(tmp_path / "1.ckpt")["state_dict"].keys() == alias.keys()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(UserError, match="altered"):
        read(tmp_path / "1.ckpt")
    file.unlink()
    with pytest.raises(UserError, match="frozen-"):
        storage.load(tmp_path / "1.ckpt")


def test_frozen_parts_that_change_after_all_get_a_file_of_their_own(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    parts = storage.FrozenParts(tmp_path, ["a"])
    for value in (1.0, 2.0):
        weight.fill_(value)
        content = {"state_dict": {"a": weight, "b": weight + 1}}
        parts.take_out(content)
        torch.save(content, tmp_path / f"{value}.ckpt")
    assert [float(read(tmp_path / f"{value}.ckpt")["a"][0]) for value in (1.0, 2.0)] == [1.0, 2.0]


def test_a_reference_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    content = {"state_dict": {"b": torch.ones(1)}, "frozen": {"sha256": "../../etc/passwd", "names": {"a": "a"}}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="frozen"):
        read(tmp_path / "a.ckpt")


def test_pickles_that_are_hostile_are_hostile(tmp_path: Path) -> None:
    with pytest.raises((MemoryError, OverflowError)):
        pickle.loads(pickle.dumps(Call(bytearray, 1 << 62)))


def test_files_have_the_rights_that_new_files_have(tmp_path):
    storage.write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
