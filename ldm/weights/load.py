"""Weights from files: tensors only, loaded strictly, with a report on what does not fit.

Reads our own checkpoints and safetensors, and the Lightning 1.x checkpoints that CompVis published: of those only the
tensors, without importing or running anything (see `ldm.weights.audit`). A state dict may have raw weights and their
moving average (`model_ema.*`, names without dots); `choose` picks one of the two.
"""

import logging
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.compat import dit, single_files
from ldm.compat.diffusers import index_of
from ldm.errors import LONGEST, UserError, shown, some
from ldm.weights import files as storage
from ldm.weights import folders
from ldm.weights.adapters import folded, is_of_adapter, started
from ldm.weights.additions import AVERAGES, EMA, averages_from_raw, begun_anew, widened
from ldm.weights.archives import config_in, unpacked
from ldm.weights.kinds import kind_of

log = logging.getLogger(__name__)

State = dict[str, Tensor]

IN_A_RUN = ("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "model.ckpt", "last.ckpt")
PARTS = ("first_stage_model.", "model.diffusion_model.", "cond_stage_model.")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_EMA_COUNTERS = ("decay", "num_updates")
# What of CLIP's loss files of Stable Diffusion may hold.
_OF_CLIP = re.compile(r"cond_stage_model\..*\b(text_projection(\.weight)?|logit_scale)")
_NUMBERS = re.compile(r"torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_\w+|complex(64|128))")
_EXAMPLES = 3
_WIDTH, _OF_A_NAME = 60, 160  # characters of a name, of one and its shapes


def locate(path: str | Path) -> Path:
    """Return the checkpoint of a path: the file itself, or the newest complete one of a run folder. Raises UserError.

    Truncated files of a run folder are skipped with a warning; `newest` finds those whose values are damaged too. A
    folder of diffusers, also one in the cache of huggingface_hub by its name there, is its JSON file.
    """
    candidates = _candidates(path)
    is_whole = Path(path).expanduser().is_file() or is_index(candidates[0])
    return candidates[0] if is_whole else storage.first_good(candidates, storage.inspect)[0]


def is_index(path: Path) -> bool:
    """Return whether a file that `locate` found stands for a folder of diffusers, config and weights in one."""
    return path.suffix == ".json"


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint that `locate` found: itself and, of a folder of diffusers, those of weights."""
    return [path, *(folders.weights_of(path) if is_index(path) else [])]


def read(path: str | Path) -> State:
    """Return the tensors of a checkpoint by name; see `newest`."""
    return newest(path)[1]


def newest(path: str | Path) -> tuple[Path, State]:
    """Return the file that was read, and its tensors by name, on the CPU, with its frozen parts.

    Damaged ones are skipped with a warning where there are earlier ones of the same run.

    path: a file, a published zip, a run folder or one of diffusers. UserError if there is no checkpoint, or if it is
        truncated, damaged, of another format, or does more than hold tensors.
    """
    return storage.first_good(_candidates(path), _read)


def _candidates(path: str | Path) -> list[Path]:
    """List the checkpoints that a path stands for, newest first. UserError if there is none."""
    try:
        path = Path(path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name that the system does not take
        raise UserError(f"{shown(str(path), _OF_A_NAME)}: no such checkpoint ({shown(str(error))})") from error
    if is_file:
        return storage.with_earlier(path)
    if not is_folder and (cached := _cached(str(path))) is not None:
        path, is_folder = cached, True
    if not is_folder:
        where = f"give a file, or a run folder with {IN_A_RUN[0]}"
        raise UserError(f"{shown(str(path), _OF_A_NAME)}: no such checkpoint; {where}")
    if (index := index_of(path)) is not None:
        return [index]
    first = [path / "checkpoints" / storage.LAST, path / "checkpoints" / storage.PREVIOUS]
    numbered = storage.with_earlier(first[1])[1:]
    found = [file for file in (*first, *numbered, *(path / name for name in IN_A_RUN)) if file.is_file()]
    if not found:
        raise UserError(f"{path}: holds no checkpoint; expected {' or '.join(IN_A_RUN)} in it")
    return found


def is_hub_name(name: str) -> bool:
    """Return whether a name is one on the hub, OWNER/NAME, rather than a path."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).parent.exists()


def _cached(name: str) -> Path | None:
    """Return the folder of a name on the hub in the local cache; None for a path. UserError if it is not there."""
    if not is_hub_name(name):
        return None
    from huggingface_hub import snapshot_download  # slow to import, seldom used

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shown(name, 60)}: no such checkpoint here nor in the cache of huggingface_hub (HF_HOME); for a model of "
            f"that name run `hf download {shown(name, 60)}` where there is a network, and copy the cache here"
        ) from error


def _read(path: Path) -> State:
    if is_index(path):
        return folders.read(path, _read)
    with unpacked(path) as file:
        try:
            content = storage.read_file(file)
        except UserError as error:
            raise UserError(str(error).replace(str(file), str(path), 1)) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no state dict")
    state = dit.renamed(state)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and _has_numbers(value)}
    others = [str(name) for name in state if name not in tensors]
    if not tensors:
        raise UserError(f"{path}: holds no state dict{'; it has ' + some(others, width=_WIDTH) if others else ''}")
    if others:
        log.warning("%s: skipped what is not a tensor of plain numbers: %s", path, some(others, width=_WIDTH))
    return tensors


def _has_numbers(value: object) -> bool:
    """Return whether a value is a tensor that can be copied: no packed or quantised one."""
    return isinstance(value, Tensor) and _NUMBERS.fullmatch(str(value.dtype)) is not None


def metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file or a published zip holds beside its tensors; none of another file."""
    if (config := config_in(path)) is not None:
        return {"config": config}
    return storage.safetensors_metadata(path) if storage.is_safetensors(path) else {}


# ---------------------------------------------------------------------------------------------------- raw or averaged


def choose(state: Mapping[str, Tensor], which: str) -> State:
    """Return raw or averaged weights, both under the raw names. UserError for an average that is not there.

    which: "raw", "ema", or the name of an average beside it. Without an average in the state dict "ema" returns the raw
    weights: in published files these are averages already.
    """
    chosen = {name: value for name, value in state.items() if not name.startswith((EMA, AVERAGES))}
    if which == "raw":
        return chosen
    prefix = EMA if which == "ema" else f"{AVERAGES}{which}."
    if not any(name.startswith(prefix) for name in state):
        if which != "ema":
            raise UserError(f"weights: {shown(which)} is unknown; choose {' or '.join(choices(state))}")
        log.info("the checkpoint holds weights of one kind; they are used")
        return chosen
    log.info("the checkpoint holds trained and averaged weights; the averaged ones (%s) are used", shown(which))
    return {name: state.get(_shadow(name, state, prefix), value) for name, value in chosen.items()}


def choices(state: Mapping[str, Tensor]) -> list[str]:
    """Return what `choose` can be asked for: "raw", "ema", and the names of the averages beside it."""
    return ["raw", "ema", *sorted({name.split(".")[1] for name in state if name.startswith(AVERAGES)})]


def is_network_alone(state: Iterable[str]) -> bool:
    """Return whether a state dict has the network of a latent diffusion model, perhaps averaged, and nothing else."""
    names = list(state)
    return bool(names) and all(name.startswith((dit.NETWORK, dit.AVERAGE)) for name in names)


def _has_average(state: Iterable[str]) -> bool:
    return any(name.startswith(EMA) for name in state)


def _shadow_prefix(prefix: str) -> str:
    """Return the prefix of the averages' names for a prefix of weights' names."""
    return EMA + prefix.removeprefix("model.").replace(".", "")


def _shadow(name: str, state: Mapping[str, Tensor], prefix: str = EMA) -> str:
    """Return the name of a weight's average, relative to the diffusion model if only that was averaged."""
    relative = prefix + name.removeprefix("model.").replace(".", "")
    return relative if name.startswith("model.") and relative in state else prefix + name.replace(".", "")


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
        return self.within(LONGEST)

    def within(self, limit: int) -> str:
        """Return the same with as many names as `limit` characters hold."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        for examples in range(_EXAMPLES, -1, -1):
            parts: dict[str, list[str]] = {}
            for kind, names in kinds:
                for part, members in _by_part(names).items():
                    named = f" ({some(members, examples, width=_OF_A_NAME)})" if examples else ""
                    parts.setdefault(part, []).append(f"{len(members)} {kind}{named}")
            line = "; ".join(f"{shown(part)}: {', '.join(problems)}" for part, problems in parts.items())
            if len(line) <= limit:
                return line or "everything fits"
        return ", ".join(f"{len(names)} {kind}" for kind, names in kinds if names)


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor] | str | Path,
    ignore: Iterable[str] = (),
    strict: bool = True,
    source: str = "state dict",
    widen: bool = False,
) -> LoadReport:
    """Copy weights into a module by name. Return a report; if `strict`, UserError before any change unless all fit.

    A part, such as an autoencoder, takes its weights also from a latent diffusion model. Tolerated are what a training
    loss learns (`loss.*`, `logvar`, `uncertainty.*`, `alignment.*`) or an average that the module does not have, an
    average that the file does not have (it starts at the raw weights), a loss or an adapter that the file has nothing
    of (it starts anew), tables that the file does not have (they follow from the config), and CLIP's `position_ids`. An
    adapter that the module does not have becomes part of its weights. Of a file with a network alone a module without
    averages takes the average, and a whole model keeps what it has in its frozen parts.

    Args:
        module: with the names of the published checkpoints.
        state: a state dict, a file or a run folder.
        ignore: prefixes of names that are neither loaded nor missing.
        strict: refuse missing and unexpected names and other shapes.
        source: where a state dict comes from, for messages.
        widen: let a first convolution have more input channels than in the file; they start at zero.
    """
    if isinstance(state, (str, Path)):
        file, state = newest(state)
        source = str(file)
    own = module.state_dict(keep_vars=True)
    is_alone = is_network_alone(state)
    if is_alone and _has_average(state) and not _has_average(own):
        state = choose(state, "ema")
    given, state = state, folders.to_theirs(state, single_files.renames(state, own), strict=False)
    state = state if any(map(is_of_adapter, own)) else folded(state, source)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    ignore += tuple(map(_shadow_prefix, ignore))
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(ignore)}
    offered = {name: tensor for name, tensor in _for_names(own, state).items() if not name.startswith(ignore)}
    if widen:
        offered |= widened(module, own, offered, source)
    anew = begun_anew(wanted, offered, source)
    offered |= started(wanted, offered)
    offered |= averages_from_raw(wanted, offered)
    kept = _frozen_beside_network(wanted) if is_alone else set()
    report = _compare(wanted, offered, _tables(module, own, offered) | anew | kept)
    if strict and not report.fits:
        raise UserError(_misfit(source, type(module).__name__, report, own, given))
    module.load_state_dict({name: offered[name] for name in report.loaded}, strict=False)
    level = logging.INFO if report.fits else logging.WARNING
    extra = f"; tolerated: {some(report.tolerated, width=_WIDTH)}" if report.tolerated else ""
    target = type(module).__name__
    log.log(level, "%s: loaded %d tensors into %s; %s%s", source, len(report.loaded), target, report, extra)
    return report


def _for_names(names: Iterable[str], state: State) -> State:
    """Return a state dict, or that of the part which has more of these names."""
    names, parts = set(names), [state]
    for prefix in PARTS:
        parts.append({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return max(parts, key=lambda offered: len(names & offered.keys()))


def _tables(module: nn.Module, own: Mapping[str, Tensor], offered: Mapping[str, Tensor]) -> set[str]:
    """Name the tables that follow from the config; none if the file has some of them with other values."""
    names = {name for part in module.modules() for name in getattr(part, "table_names", ())}
    pairs = [(own[name].float().cpu(), offered[name].float().cpu()) for name in names if name in offered]
    half = {"rtol": 2e-3, "atol": 1e-5}  # as precise as tables in half precision are
    return names if all(a.shape == b.shape and torch.allclose(a, b, **half) for a, b in pairs) else set()


def _frozen_beside_network(wanted: Mapping[str, Tensor]) -> set[str]:
    """Name what a training does not change in a latent diffusion model beside its network; nothing of a part alone."""
    beside = {name for name in wanted if not name.startswith(dit.NETWORK)}
    is_whole = len(beside) < len(wanted)
    return {name for name in beside if is_whole and not wanted[name].requires_grad}


def _misfit(source: str, target: str, report: LoadReport, own: Iterable[str], state: Iterable[str]) -> str:
    """Say in one line why weights do not fit: what they are, if that is another thing, else which names."""
    kind = kind_of(state)
    if kind is not None and kind != kind_of(own):
        return f"{source}: is {kind.name}, and does not fit {target}; {kind.remedy}"
    start = f"{source}: does not fit {target}: "
    return start + report.within(max(LONGEST - len(start), _EXAMPLES * 20))


def _compare(wanted: Mapping[str, Tensor], offered: Mapping[str, Tensor], tables: Container[str]) -> LoadReport:
    common = [name for name in wanted if name in offered]
    loaded = [name for name in common if _form(wanted[name]) == _form(offered[name])]
    mismatched = [name for name in common if _form(wanted[name]) != _form(offered[name])]
    filled = {id(wanted[name]) for name in loaded}  # one tensor may have two names
    absent = [name for name in wanted if name not in offered and id(wanted[name]) not in filled]
    missing = [name for name in absent if not (_may_be_absent(name) or name in tables)]
    surplus = [name for name in offered if name not in wanted]
    unexpected = [name for name in surplus if not _may_be_surplus(name)]
    tolerated = [name for name in absent if name not in missing] + [name for name in surplus if _may_be_surplus(name)]
    shapes = [f"{name} {_shape(offered[name])} in the file, {_shape(wanted[name])} here" for name in mismatched]
    return LoadReport(*map(tuple, (loaded, missing, unexpected, shapes, tolerated)))


def _may_be_absent(name: str) -> bool:
    is_counter = name.startswith((EMA, AVERAGES)) and name.rpartition(".")[2] in _EMA_COUNTERS
    return is_counter or name.endswith("position_ids")


def _may_be_surplus(name: str) -> bool:
    inner = name.removeprefix("first_stage_model.").removeprefix("cond_stage_model.")
    of_training = ("loss.", "uncertainty.", "alignment.", EMA, AVERAGES, "denoiser.")
    is_beside = inner.startswith(of_training) or inner in ("colorize", "logvar")
    return is_beside or name.endswith("position_ids") or bool(_OF_CLIP.fullmatch(name))


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        part = f"{head}.{rest.partition('.')[0]}" if head == "model" else head
        parts.setdefault(part if rest else "top level", []).append(name)
    return parts


def _form(tensor: Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_complex()  # of a complex number only a half would be copied


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")" + (" of complex numbers" if tensor.is_complex() else "")
