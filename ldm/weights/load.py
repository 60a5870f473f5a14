"""Weights from files: tensors only, loaded strictly, with a report on what does not fit.

Reads our own checkpoints and safetensors, and the Lightning 1.x checkpoints that CompVis published: of those only the
tensors, without importing or running anything (see `ldm.weights.audit`). A state dict may have raw weights and their
moving average (`model_ema.*`, names without dots); `choose` picks one of the two.
"""

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.compat.diffusers import index_of
from ldm.errors import UserError
from ldm.weights import files as storage
from ldm.weights import folders
from ldm.weights.archives import config_in, unpacked
from ldm.weights.audit import UnsafeCheckpoint, load_inert

log = logging.getLogger(__name__)

State = dict[str, Tensor]

IN_A_RUN = ("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "model.ckpt", "last.ckpt")
EMA = "model_ema."
PARTS = ("first_stage_model.", "model.diffusion_model.", "cond_stage_model.")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The tables of a discrete process, which follow from the config.
_SCHEDULE = re.compile(r"betas|(alphas_cumprod|sqrt_|log_one_minus_|posterior_)\w*")
_EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")
_EXAMPLES = 3


def locate(path: str | Path) -> Path:
    """Return the checkpoint of a path: the file itself, or the newest readable one of a run folder. Raises UserError.

    Truncated and damaged files of a run folder are skipped with a warning. A folder of diffusers is its JSON file, and
    a name on the hub the folder in the cache of huggingface_hub.
    """
    path = _cached(str(path)) or Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; give a file, or a run folder with {IN_A_RUN[0]}")
    if (index := index_of(path)) is not None:
        return index
    problems = []
    for candidate in _candidates(path):
        try:
            if not _is_safetensors(candidate):
                storage.inspect(candidate)
        except (UserError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s; using %s, which was saved before it", problem, candidate.name)
        return candidate
    if problems:
        raise UserError(problems[0] + "; no other checkpoint beside it is good")
    raise UserError(f"{path}: holds no checkpoint; expected {' or '.join(IN_A_RUN)} in it")


def _cached(name: str) -> Path | None:
    """Return the folder of a name on the hub in the local cache; None for a path. UserError if it is not there."""
    if Path(name).exists() or not _HUB_NAME.fullmatch(name) or Path(name).parent.exists():
        return None
    from huggingface_hub import snapshot_download  # slow to import, seldom used

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no such file or folder, nor is it in the cache of huggingface_hub (HF_HOME); for a model of that "
            f"name run `hf download {name}` where there is a network, and copy the cache here"
        ) from error


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first."""
    numbered = sorted((folder / "checkpoints").glob("step=*.ckpt"), reverse=True)
    named = [folder / name for name in IN_A_RUN]
    return [file for file in [*named[:2], *numbered, *named[2:]] if file.is_file()]


def read(path: str | Path) -> State:
    """Return the tensors of a checkpoint by name, on the CPU, with its frozen parts.

    `path` is a file, a published zip, a run folder or one of diffusers. UserError if there is no checkpoint, or if it
    is truncated, of another format, or does more than hold tensors.
    """
    path = locate(path)
    if path.suffix == ".json":
        return folders.read(path, read)
    try:
        with unpacked(path) as file:
            content = _read_safetensors(file) if _is_safetensors(file) else _read_torch(file)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            storage.restore_frozen(content, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no state dict")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    others = [str(name) for name in state if name not in tensors]
    if not tensors:
        raise UserError(f"{path}: holds no state dict")
    if others:
        log.warning("%s: skipped what is not a tensor: %s", path, _some(others))
    return tensors


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint that `locate` found: itself and, of a folder of diffusers, those of weights."""
    return [path, *(folders.weights_of(path) if path.suffix == ".json" else [])]


def metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file or a published zip holds beside its tensors; none of another file."""
    if (config := config_in(path)) is not None:
        return {"config": config}
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: is truncated or not a safetensors file ({error})") from error


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is truncated or not a safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    """Return the content of a file of torch.save: read as plain tensors, else by the unpickler that runs nothing."""
    storage.inspect(path)
    mmap = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        log.debug("%s: holds more than tensors; reading the tensors alone", path)
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        log.debug("%s: %s", path, error)
    try:
        return load_inert(path, mmap=mmap)
    except UnsafeCheckpoint as error:
        raise UserError(f"{path}: refused, this file does more than hold tensors ({error})") from error
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is truncated or damaged ({_first_line(error)})") from error


# ---------------------------------------------------------------------------------------------------- raw or averaged


def choose(state: Mapping[str, Tensor], which: Literal["raw", "ema"]) -> State:
    """Return raw or averaged weights, both under the raw names.

    Without an average in the state dict "ema" returns the raw weights: in published files these are averages already.
    """
    if which not in ("raw", "ema"):
        raise UserError(f"weights: {which!r} is unknown; choose raw or ema")
    chosen = {name: value for name, value in state.items() if not name.startswith(EMA)}
    if which == "raw":
        return chosen
    if not any(name.startswith(EMA) for name in state):
        log.info("the checkpoint holds no average; its only weights are used")
        return chosen
    return {name: state.get(_shadow(name, state), value) for name, value in chosen.items()}


def _shadow_prefix(prefix: str) -> str:
    """Return the prefix of the averages' names for a prefix of weights' names."""
    return EMA + prefix.removeprefix("model.").replace(".", "")


def _shadow(name: str, state: Mapping[str, Tensor]) -> str:
    """Return the name of a weight's average, relative to the diffusion model if only that was averaged."""
    relative = _shadow_prefix(name)
    return relative if name.startswith("model.") and relative in state else EMA + name.replace(".", "")


def _averages_from_raw(expected: Iterable[str], state: Mapping[str, Tensor]) -> State:
    """Return raw weights as the averages of a checkpoint without averages."""
    raw = {name.removeprefix("model.").replace(".", ""): value for name, value in state.items()}
    raw |= {name.replace(".", ""): value for name, value in state.items()}
    names = [name for name in expected if name.startswith(EMA)]
    return {name: raw[name.removeprefix(EMA)] for name in names if name.removeprefix(EMA) in raw}


# ------------------------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class LoadReport:
    """Names of weights: loaded, missing in the file, unexpected by the module, of another shape, tolerated."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    tolerated: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Return whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """Return numbers by top-level part, with a few names each, in one line."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        parts: dict[str, list[str]] = {}
        for kind, names in kinds:
            for part, members in _by_part(names).items():
                parts.setdefault(part, []).append(f"{len(members)} {kind} ({_some(members)})")
        return "; ".join(f"{part}: {', '.join(problems)}" for part, problems in parts.items()) or "everything fits"


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor] | str | Path,
    ignore: Iterable[str] = (),
    strict: bool = True,
) -> LoadReport:
    """Copy weights into a module by name. Return a report; if `strict`, UserError before any change unless all fit.

    A part, such as an autoencoder, takes its weights also from a latent diffusion model. Tolerated are a training loss
    (`loss.*`, `logvar`) or an average that the module does not have, an average that the file does not have (it starts
    at the raw weights), tables of the schedule of which the file has none, and CLIP's `position_ids`.

    Args:
        module: with the names of the published checkpoints.
        state: a state dict, a file or a run folder.
        ignore: prefixes of names that are neither loaded nor missing.
        strict: refuse missing and unexpected names and other shapes.
    """
    source = str(state) if isinstance(state, (str, Path)) else "state dict"
    state = read(state) if isinstance(state, (str, Path)) else dict(state)
    own = module.state_dict(keep_vars=True)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    ignore += tuple(map(_shadow_prefix, ignore))
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(ignore)}
    offered = {name: tensor for name, tensor in _for_names(own, state).items() if not name.startswith(ignore)}
    if not any(name.startswith(EMA) for name in offered):
        offered |= _averages_from_raw(wanted, offered)
    report = _compare(wanted, offered)
    if strict and not report.fits:
        raise UserError(f"{source}: does not fit {type(module).__name__}: {report}")
    module.load_state_dict({name: offered[name] for name in report.loaded}, strict=False)
    level = logging.INFO if report.fits else logging.WARNING
    extra = f"; tolerated: {_some(report.tolerated)}" if report.tolerated else ""
    target = type(module).__name__
    log.log(level, "%s: loaded %d tensors into %s; %s%s", source, len(report.loaded), target, report, extra)
    return report


def _for_names(names: Iterable[str], state: State) -> State:
    """Return a state dict, or that of its parts which alone holds any of these names."""
    names = set(names)
    for prefix in ("", *PARTS):
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not names.isdisjoint(inner):
            return inner
    return state


def _compare(wanted: Mapping[str, Tensor], offered: Mapping[str, Tensor]) -> LoadReport:
    common = [name for name in wanted if name in offered]
    loaded = [name for name in common if wanted[name].shape == offered[name].shape]
    mismatched = [name for name in common if wanted[name].shape != offered[name].shape]
    filled = {id(wanted[name]) for name in loaded}  # one tensor may have two names
    absent = [name for name in wanted if name not in offered and id(wanted[name]) not in filled]
    has_schedule = any(_SCHEDULE.fullmatch(name) for name in offered)
    missing = [name for name in absent if not _may_be_absent(name) and (has_schedule or not _SCHEDULE.fullmatch(name))]
    surplus = [name for name in offered if name not in wanted]
    unexpected = [name for name in surplus if not _may_be_surplus(name)]
    tolerated = [name for name in absent if name not in missing] + [name for name in surplus if _may_be_surplus(name)]
    shapes = [f"{name} {_shape(offered[name])} in the file, {_shape(wanted[name])} here" for name in mismatched]
    return LoadReport(*map(tuple, (loaded, missing, unexpected, shapes, tolerated)))


def _may_be_absent(name: str) -> bool:
    return name in _EMA_COUNTERS or name.endswith("position_ids")


def _may_be_surplus(name: str) -> bool:
    inner = name.removeprefix("first_stage_model.").removeprefix("cond_stage_model.")
    return inner.startswith(("loss.", EMA)) or inner in ("colorize", "logvar") or name.endswith("position_ids")


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        part = f"{head}.{rest.partition('.')[0]}" if head == "model" else head
        parts.setdefault(part if rest else "top level", []).append(name)
    return parts


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_EXAMPLES]) + (f" and {len(names) - _EXAMPLES} more" if names[_EXAMPLES:] else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
