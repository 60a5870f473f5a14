"""Files that want to do more than hold tensors: nothing that they name is imported, called or changed."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.weights.load import read

WEIGHTS = {"model.weight": torch.arange(6.0).view(3, 2), "model.bias": torch.arange(3.0)}


class Foreign:
    """Stands for a class that only the writer of a file has."""


class Runs:
    """Pickles as a call of any function."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(canary: Path) -> dict[str, object]:
    code = f"open({str(canary)!r}, 'w').close()"
    nested = Runs(eval, code)
    return {
        "system": {"callbacks": Runs(os.system, f"touch {canary}"), "state_dict": WEIGHTS},
        "eval": {"callbacks": Runs(eval, code), "state_dict": WEIGHTS},
        "exec": {"state_dict": WEIGHTS, "loops": [Runs(exec, code)]},
        "in_state_dict": {"state_dict": {**WEIGHTS, "evil": nested}},
        "as_state_dict": {"state_dict": nested},
        "as_file": nested,
        "import": {"state_dict": WEIGHTS, "x": Runs(__import__, "antigravity")},
        "getattr_chain": {"state_dict": WEIGHTS, "x": Runs(getattr, Runs(__import__, "os"), "system")},
        "torch_load": {"state_dict": WEIGHTS, "x": Runs(torch.storage._load_from_bytes, pickle.dumps(nested))},
        "as_tensor_part": {
            "state_dict": {"a": Runs(torch._utils._rebuild_tensor_v2, nested, 0, (1,), (1,), True, None)}
        },
        "as_parameter": {"state_dict": {"a": Runs(torch._utils._rebuild_parameter, nested, True, None)}},
    }


LEAVE_NO_TRACE = {"import", "getattr_chain"}
KINDS = sorted(hostile(Path("x")))


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_file_names_is_run(tmp_path: Path, kind: str, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    torch.save(hostile(canary)[kind], path, _use_new_zipfile_serialization=zipped)
    try:
        got = read(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert got.keys() == WEIGHTS.keys() and all(torch.equal(got[name], WEIGHTS[name]) for name in got)
    assert not canary.exists()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - LEAVE_NO_TRACE))
def test_the_hostile_files_are_hostile(tmp_path: Path, kind: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    torch.save(hostile(canary)[kind], path)
    try:
        torch.load(path, weights_only=False)
    except (RuntimeError, AttributeError, TypeError, pickle.UnpicklingError):
        pass  # after it has run
    assert canary.exists()


def test_a_file_cannot_change_the_functions_that_rebuild_tensors(tmp_path: Path) -> None:
    function = torch._utils._rebuild_tensor_v2
    # the function; (None, {"poisoned": 1}), which is a state in slots; BUILD, which sets the slots as attributes
    program = b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00poisonedK\x01s\x86b."
    path, source = tmp_path / "evil.ckpt", tmp_path / "good.ckpt"
    torch.save({"state_dict": WEIGHTS, "x": Foreign()}, source)
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(path, "w") as evil:
        for name in good.namelist():
            evil.writestr(name, b"\x80\x02" + program if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(UserError, match="refused"):
        read(path)
    assert not vars(function).get("poisoned")
