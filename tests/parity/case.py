"""A recorded case: its config, tensors and noise tape, and how a model is built and filled for it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ldm.compat import instantiate

SMALLEST_SCALE = 0.1


def case_names(folder: Path) -> list[str]:
    """List the cases of a folder."""
    return sorted(path.stem for path in folder.glob("*.json"))


def named_normal(name: str, shape) -> np.ndarray:
    """Draw float64 standard normals that depend on a name only."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.RandomState(seed).standard_normal(tuple(shape))


def fill(name: str, shape) -> torch.Tensor:
    """Give the recorded weight of a parameter, of a size that suits its kind."""
    values = named_normal(name, shape)
    kind = name.rsplit(".", 1)[-1]
    if kind == "running_var":
        values = 1 + 0.1 * np.abs(values)
    elif kind == "scale" or (len(shape) == 1 and kind == "weight"):
        values = 1 + 0.1 * values
    elif len(shape) <= 1 or kind == "loc":
        values = 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


class Tape:
    """Hand out the recorded draws, in order of use, separately for each function that asked for them."""

    def __init__(self, entries: list[tuple[str, torch.Tensor]]) -> None:
        self.entries = list(entries)

    def take(self, *askers: str) -> torch.Tensor:
        """Give the next draw of one of these functions (of any function if none is named)."""
        for i, (asker, values) in enumerate(self.entries):
            if not askers or asker in askers:
                del self.entries[i]
                return values
        raise AssertionError(f"the tape holds no further draw of {askers or 'any function'}")

    def noise(self, *askers: str):
        """Make a noise hook that gives the draws of these functions."""

        def draw(shape):
            values = self.take(*askers)
            assert tuple(values.shape) == tuple(shape), f"{askers} drew {tuple(values.shape)}, asked: {tuple(shape)}"
            return values

        return draw


@dataclass
class Case:
    """Hold one recorded case."""

    folder: Path
    name: str

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    @property
    def op(self) -> str:
        return self.meta["op"]

    @property
    def args(self) -> dict:
        return self.meta.get("args") or {}

    @property
    def config(self) -> dict:
        return self.meta["config"]

    @property
    def params(self) -> dict:
        """Give the parameters of the outermost node of the config."""
        return self.config.get("params") or {}

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self._with_prefix("in.")

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        return self._with_prefix("out.")

    def _with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def tape(self) -> Tape:
        askers = [asker for _, _, asker in self.meta["noise"]]
        return Tape([(asker, self.tensors[f"tape.{i:04d}"]) for i, asker in enumerate(askers)])

    def allow_args(self, *known: str) -> None:
        """Refuse options that the adapter would silently ignore."""
        unknown = set(self.args) - {*known, "relative"}
        assert not unknown, f"the adapter of '{self.op}' does not know the options {sorted(unknown)}"

    def cotangent(self, like: torch.Tensor, suffix: str = "cot") -> torch.Tensor:
        return torch.from_numpy(named_normal(f"{self.name}/{suffix}", like.shape)).to(like.dtype)

    def model(self, **extra):
        """Build the model of the config, check its state dict, fill it by name, and put it in eval mode."""
        node = {**self.config, "params": {**self.params, **extra}}
        module = instantiate(node)
        for digest in self.meta["state_dicts"][:1]:
            listed = json.loads((self.folder / "params" / f"{digest}.json").read_text())
            check_names(module, listed)
            fill_module(module, listed)
        return module.eval()


def check_names(module: torch.nn.Module, listed: list) -> None:
    """Compare names, shapes and dtypes of a state dict with the recorded list."""
    want = {name: (tuple(shape), dtype) for name, shape, dtype, _ in listed}
    got = {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in module.state_dict().items()}
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    assert not missing and not extra, f"state dict: missing {missing[:8]}, unexpected {extra[:8]}"
    wrong = [f"{name}: {got[name]}, recorded {want[name]}" for name in want if got[name] != want[name]]
    assert not wrong, f"state dict: {wrong[:8]}"


def fill_module(module: torch.nn.Module, listed: list) -> None:
    """Load the recorded weights; a tensor under two names takes those of the first."""
    state = module.state_dict()
    new, seen = dict(state), {}
    for name, shape, _, filled in listed:
        if not filled:
            continue
        owner = seen.setdefault(state[name].data_ptr(), name) if state[name].numel() else name
        new[name] = fill(owner, shape)
    module.load_state_dict(new, strict=True)


def flatten(value, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name the tensors of a nested result as the recorder did: a.0, a.key."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{name}.{i}")
    else:
        yield name, torch.as_tensor(value)


def compare(case: Case, got: Mapping) -> None:
    """Hold a result against every recorded output of the case."""
    results = dict(flatten(got, ""))
    missing = sorted(case.outputs.keys() - results.keys())
    assert not missing, f"not computed: {missing}"
    problems = [_difference(case, key, results[key].detach(), want) for key, want in case.outputs.items()]
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)


def _difference(case: Case, key: str, got: torch.Tensor, want: torch.Tensor) -> str | None:
    if got.shape != want.shape:
        return f"{key}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}"
    if not want.is_floating_point():
        wrong = (got != want).sum().item()
        return f"{key}: {wrong} of {want.numel()} integers differ" if wrong else None
    got, want = got.double(), want.double()
    tolerance = case.meta["tol"]
    if case.args.get("relative"):
        allowed = tolerance * want.abs()
    else:
        allowed = torch.full_like(want, tolerance * max(want.abs().max().item() if want.numel() else 0, SMALLEST_SCALE))
    error = (got - want).abs()
    same = (got == want) | (got.isnan() & want.isnan())
    if bool(((error <= allowed) | same).all()):
        return None
    worst = (error / allowed)[~same].max().item()
    return f"{key}: error {error[~same].max().item():.3g} is {worst:.3g} times what is allowed"
