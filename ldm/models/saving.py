"""The weights of a model on disk for others: one file with its config, or a folder as diffusers has them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from torch import Tensor, nn

from ldm.compat import diffusers, single_files
from ldm.compat.diffusers import Folder
from ldm.conditioning.text import CLIPTextConditioner
from ldm.environment import first_name
from ldm.errors import UserError, some
from ldm.models.adapting import in_names_of_diffusers, read_adapter
from ldm.models.cards import card, evaluations_in, modelspec
from ldm.models.loading import Loaded, ModelSource, is_first_stage, load_first_stage, load_model, read_config
from ldm.weights import files as storage
from ldm.weights import folders, post_hoc
from ldm.weights import load as checkpoint
from ldm.weights.adapters import Adapter
from ldm.writing import replacing

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

_log = logging.getLogger(__name__)
Format = Literal["safetensors", "diffusers", "compvis"]
FORMATS: tuple[Format, ...] = get_args(Format)
ADAPTER = "adapter"  # what a run trained beside its base, alone
LARGEST_SHARD = 10 * 10**9  # bytes of a file of weights in a folder, as diffusers has it


def save_model(
    model: LatentDiffusion, path: str | Path, config: Mapping[str, Any] | None = None, format: Format = "safetensors"
) -> Path:
    """Write weights and section `model` of the config; see `LatentDiffusion.save_pretrained`."""
    section = config if config is not None else model.config
    if section is None:
        raise UserError("save_pretrained: this model was not loaded from a config; give the section `model` as config")
    if format not in FORMATS:
        raise UserError(f"save_pretrained: format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format == "diffusers":
        return save_folder(path, model, dict(section))
    if format == "compvis":
        return save_checkpoint(path, model.state_dict(), section)
    return save_state(path, model.state_dict(), _texts(model, section, Path(path).stem))


def _texts(model: nn.Module, section: Mapping[str, Any], title: str) -> dict[str, str]:
    """Return what a file of a model says of it: the config, what is merged into the weights, and what others read."""
    content = yaml.safe_dump({"model": dict(section)}, sort_keys=False, allow_unicode=True)
    merged = " ".join(getattr(model, "adapters", ()))
    return {"config": content, **({"adapters": merged} if merged else {}), **modelspec(section, title)}


def save_adapter(path: str | Path, adapter: Adapter, section: Mapping[str, Any] | None) -> Path:
    """Write an adapter alone, as diffusers loads it where it has such layers. UserError if it cannot be written."""
    adapter = in_names_of_diffusers(adapter, section)
    return save_state(path, adapter.entries(), {"format": "pt", "adapter": adapter.digest()})


def save_state(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and texts as a safetensors file, whole or not at all. UserError if it cannot be written."""
    path = Path(path)
    if not path.name:
        raise UserError(f"{path}: is a folder; name a file")
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    # One tensor may have two names; safetensors wants memory for each.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    return _write_whole(path, lambda beside: storage.write_safetensors(beside, tensors, metadata))


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], section: Mapping[str, Any]) -> Path:
    """Write tensors under the names of published checkpoints, without config. UserError if it cannot be written.

    section: the config of the model.
    """
    if "latent_mean" in state:
        raise UserError("latent_scale: CompVis has one factor, not a mean and std of each channel; use safetensors")
    state = folders.to_ours(state, single_files.published(state, dict(section)))
    path = Path(path)
    path = path if path.suffix == ".ckpt" else path.with_name(f"{path.name}.ckpt")
    content = {"state_dict": {name: value.detach().cpu() for name, value in state.items()}}
    return _write_whole(path, lambda beside: storage.write(content, beside))


def save_folder(
    path: str | Path,
    model: nn.Module,
    section: dict[str, Any],
    half: bool = False,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a latent diffusion model or an autoencoder as a new folder that diffusers reads, whole or not at all.

    section: the config from which it was built; evaluations: what the model card tells of figures, see `cards.card`.
    UserError names the parameter that diffusers cannot express.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already; name a new folder")
    described = diffusers.write(section, _scale_of(model))
    for part in model.modules():
        if isinstance(part, CLIPTextConditioner):
            part.load_weights()  # which are otherwise read at the first use
    state = halved(model.state_dict()) if half else model.state_dict()
    kind = described.files[diffusers.INDEX]["_class_name"] if described.files else described.parts[0].kind.name
    text = card(path.name, kind, section, evaluations or {})
    return _write_whole(path, lambda beside: _write_folder(beside, described, state, model, text))


def _write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a file or a new folder beside its place, then move it there. UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            write(beside)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _scale_of(model: nn.Module) -> float:
    """Return the factor of the latents: as the config has it, or as it was measured; 1 for a first stage."""
    scale = getattr(model, "latent_scale", None)
    if scale is None:
        return 1.0
    if scale.has_channels:
        raise UserError("latent_scale: diffusers has one factor, not a mean and std of each channel; use safetensors")
    return float(model.scale_factor if scale.is_measured else scale.value)


def _write_folder(path: Path, described: Folder, state: Mapping[str, Tensor], model: nn.Module, text: str) -> None:
    for part, tensors in folders.states_of(described.parts, state):
        _write_weights(path / part.folder / part.kind.weights, tensors)
        config = part.config
        if part.kind in diffusers.TEXTS:
            encoder = model.get_submodule(part.prefix.rstrip("."))
            if part.kind is not diffusers.LDM_BERT:
                config = {**encoder.transformer.text_model.config.to_dict(), **config}
            encoder.tokenizer.save_folder(path / part.tokenizer)
            if index := described.files.get(diffusers.INDEX):
                tokenizer = diffusers.read_json(path / part.tokenizer / "tokenizer_config.json")
                index[part.tokenizer] = ["transformers", tokenizer["tokenizer_class"]]
        _write_json(path / part.folder / diffusers.CONFIG, config)
    for name, content in described.files.items():
        _write_json(path / name, content)
    (path / "README.md").write_text(text, encoding="utf-8")


def _write_weights(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as STEM.safetensors, or where these are many as shards with an index, as diffusers does."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > LARGEST_SHARD and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_state(stem.with_name(f"{stem.name}.safetensors"), tensors, {"format": "pt"})
        return
    names = [f"{stem.name}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        save_state(stem.with_name(file), shard, {"format": "pt"})
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(stem.with_name(f"{stem.name}.safetensors.index.json"), index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_averages(run: Path, lengths: Sequence[float], out: Path, step: int | None = None) -> list[Path]:
    """Write a model for each relative length of an average, made from the snapshots of a run; return the files.

    step: as of this step, by default that of the last snapshot. Raises UserError; see `ldm.weights.post_hoc`.
    """
    snapshots = post_hoc.find_snapshots(run / "snapshots", first_name(run))
    step = max(snapshot.profile.steps for snapshot in snapshots) if step is None else step
    named = {f"{length:.4f}": length for length in lengths}  # as the files are
    targets = [post_hoc.Profile(step, length) for length in named.values()]
    for target in targets:
        post_hoc.gamma_of(target.sigma_rel)  # refuses lengths that there are not before anything is read
    source = ModelSource(run)
    config = yaml.safe_dump(read_config(source), sort_keys=False, allow_unicode=True)
    found, state = checkpoint.newest(source.files()[1])
    state = checkpoint.choose(state, "raw")
    written = []
    for target in targets:
        averaged = {f"model.{name}": value for name, value in post_hoc.reconstruct(snapshots, target).items()}
        if unknown := averaged.keys() - state.keys():
            raise UserError(f"{run / 'snapshots'}: are of another model than {found}: {some(sorted(unknown), 1)}")
        texts = {"config": config, "checkpoint": found.name, "sigma_rel": str(target.sigma_rel), "step": str(step)}
        written.append(save_state(out / f"step={step:09}-sigma={target.sigma_rel:.4f}", state | averaged, texts))
        _log.info("%s: average of relative length %.4f after %d steps", written[-1], target.sigma_rel, step)
    return written


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with floating-point numbers in 16 bits."""
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def export_run(
    run: str | Path,
    out: Path,
    averaged: bool = False,
    half: bool = False,
    format: str = "safetensors",
    adapters: Sequence[str] | None = None,
) -> None:
    """Write the newest good checkpoint of a run, whole or not at all. Raises UserError.

    A folder of diffusers gets the averaged weights, for which it has one place only. So does what adapters are merged
    into: the run's own, and those of `adapters` unless it is None. Format `adapter` writes the run's own alone.
    """
    source = ModelSource(run, adapters=tuple(adapters or ()))
    if format == ADAPTER:
        _log.info("%s: written alone", save_adapter(out, read_adapter(run), read_config(source)["model"]))
        return
    if format == "diffusers" or adapters is not None:
        is_first = is_first_stage(source)
        loaded = load_first_stage(source) if is_first else load_model(source)
        training = (loaded.content.get("training") or {}).get("params") or {}
        if adapters is not None and not adapters and not training.get("adapter"):
            raise UserError(f"--merge: {run} has no adapter of its own; name files of adapters")
        _write_loaded(out, loaded.autoencoder if is_first else loaded.model, loaded, half, format, Path(run))
        return
    content = read_config(source)
    config = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    found, state = checkpoint.newest(source.files()[1])
    if averaged:
        state = checkpoint.choose(state, "ema")
    if half:
        state = halved(state)
    if format == "compvis":
        out = save_checkpoint(out, state, content["model"])
    else:
        texts = {"config": config, "checkpoint": found.name, **modelspec(content["model"], out.stem)}
        out = save_state(out, state, texts)
    _log.info("%s: %d tensors of %s", out, len(state), found)


def _write_loaded(out: Path, model: nn.Module, loaded: Loaded, half: bool, format: str, run: Path) -> None:
    """Write the weights that a model uses, alone, in one of the formats."""
    section = loaded.content["model"]
    state = halved(model.state_dict()) if half else model.state_dict()
    if format == "diffusers":
        out = save_folder(out, model, section, half, _evaluations(run, loaded))
    elif format == "compvis":
        out = save_checkpoint(out, state, section)
    else:
        out = save_state(out, state, _texts(model, section, out.stem))
    _log.info("%s: written as %s", out, format)


def _evaluations(run: Path, loaded: Loaded) -> dict[str, Mapping[str, Any]]:
    """Return what was measured of the checkpoint that was loaded, where that lies in its run folder."""
    if not run.is_dir() or not any(run.rglob("evaluation.json")):
        return {}
    return evaluations_in(run, loaded.provenance()["checkpoint_sha256"])
