"""Which code a config may call: a YAML file may come from a stranger, and so may the run folder that holds it.

A target lies within `OURS`, is one of the classes of others that only compute, or lies within what is allowed: named by
`allow` (`--allow` on a command line), by the environment variable LDM_ALLOW=NAME,NAME, or by a YAML file of `--base` if
it lies in the working folder or in one of the packages of `TRUSTED`. Nothing else is imported. What is found has to be
defined there, and has to say what it makes: a class, or a constructor, which is a function annotated with the class
that it returns.
"""

import importlib
import inspect
import os
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from typing import Any

from ldm.allowance import COMMANDS, PLACE, VARIABLES, add, allowed
from ldm.errors import UserError, shown

OURS = (
    "ldm.autoencoder", "ldm.compat.compvis.data", "ldm.conditioning", "ldm.data", "ldm.diffusion", "ldm.evaluation",
    "ldm.models", "ldm.networks", "ldm.sampling", "ldm.toy", "ldm.training", "ldm.weights.adapters",
)  # fmt: skip
# Of others, only what computes: their other classes write and delete files, run what they read, or talk to servers.
# They are known by a class from which they inherit, or by name; one's own YAML may name all classes of these packages.
_BY_BASE = {
    "torch.nn": ("torch.nn.Module",),
    "torch.optim": ("torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler"),
    "torchvision.ops": ("torch.nn.Module",),
    "torchvision.transforms": ("builtins.object",),
    "torchao.optim": ("torch.optim.Optimizer",),
    "bitsandbytes.optim": ("torch.optim.Optimizer",),
}
_BY_NAME = {
    "torch.utils.data": ("ChainDataset", "ConcatDataset", "StackDataset", "Subset", "TensorDataset"),
    "pytorch_lightning.callbacks": (
        "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor", "ModelSummary",
        "RichModelSummary", "RichProgressBar", "StochasticWeightAveraging", "ThroughputMonitor", "Timer",
        "TQDMProgressBar",
    ),
    "pytorch_lightning.loggers": ("CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
    "pytorch_lightning.plugins": (
        "BitsandbytesPrecision", "DoublePrecision", "HalfPrecision", "LightningEnvironment", "LSFEnvironment",
        "MixedPrecision", "SLURMEnvironment", "TorchElasticEnvironment", "TorchSyncBatchNorm",
    ),
    "pytorch_lightning.profilers": (),
    "pytorch_lightning.strategies": (
        "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy",
    ),
}  # fmt: skip
_THEIRS = (*_BY_BASE, *_BY_NAME)
TRUSTED = (*OURS, *_THEIRS)
_OF_THE_RUN = "ldm.training.lightning_fixes"  # writes where the run says, not where a config does
_BUT = "ldm.training.lightning_fixes.checkpoints.Checkpoints"
# Our functions for configs, and classes whose class methods are; others of ours read, write, import and train.
_CONSTRUCTORS = (
    "ldm.data.image_pairs.degradation.bsrgan", "ldm.data.image_pairs.degradation.bsrgan_light",
    "ldm.diffusion.discrete.DiscreteVP",
)  # fmt: skip
# What a class of others may get from another package: it takes anything, and iterates over what it takes.
_HOLDS = {"torch.utils.data": "torch.utils.data.Dataset"}  # and else modules


def allow(package: str) -> str:
    """Let configs name classes of a package or module, until the program (see `main_guard`) ends; return its name.

    "pipe:" lets them run the commands of shards, "path:FOLDER" write there, "env:NAME" read that variable. Raises
    UserError if it cannot be imported.
    """
    if package == COMMANDS or package.startswith((PLACE, VARIABLES)):
        add(package)
        return package
    top = package.partition(".")[0]
    if not all(map(str.isidentifier, package.split("."))) or _spec(top) is None:
        raise UserError(f"--allow {shown(package)}: there is no such package here")
    add(package)
    return package


def allow_own(targets: Iterable[str]) -> None:
    """Allow what YAML of one's own names: packages that lie in the working folder, any class of trusted ones."""
    targets = set(targets)
    for top in {target.partition(".")[0] for target in targets}:
        if _is_here(top):
            allow(top)
    for target in targets:
        if _of_others(target):
            add(target)


def home_of(target: str) -> str:
    """Return the trusted or allowed package within which a target lies, empty if there is none."""
    home = next((home for home in OURS if is_within(target, home)), "")
    if home:
        return "" if is_within(target, _OF_THE_RUN) and target != _BUT else home
    home, allows = _of_others(target), [name for name in allowed() if is_within(target, name)]
    if home and (allows or home in _BY_BASE or target.rpartition(".")[2] in _BY_NAME[home]):
        return home
    return allows[0] if allows else ""


def let_import(home: str) -> None:
    """Let an allowed package be imported from the working folder, if that is where it lies."""
    if home not in TRUSTED and os.getcwd() not in sys.path and _is_here(home.partition(".")[0]):
        sys.path.append(os.getcwd())  # after everything that is installed


def is_theirs(target: str) -> bool:
    """Return whether a target is in one of the trusted packages of others."""
    return home_of(target) in _THEIRS


def _of_others(target: str) -> str:
    """Return the trusted package of others within which a target lies, empty if there is none."""
    return next((home for home in _THEIRS if is_within(target, home)), "")


def is_within(name: str, package: str) -> bool:
    """Return whether a dotted name is that of a package or lies below it."""
    return f"{name}.".startswith(f"{package}.")


def why_not(target: str) -> str:
    """Say why a target that is within nothing trusted cannot be called, and what could make it so."""
    top = target.partition(".")[0]
    if _spec(top) is None:
        return f"there is no package {shown(top)} here"
    if _of_others(target):
        return f"it may write, run or send something; if you trust the config, give --allow {target}"
    if _is_own(top):
        return f"it is not trusted; if the package is yours, give --allow {top}"
    return "it is not trusted: configs name parts of ldm, layers of torch, callbacks of Lightning, what --allow names"


def problem_of(found: Any, holder: Any, module: str, home: str, is_called: bool = True, target: str = "") -> str:
    """Return why an object, an attribute of `holder` found in a module, is not for a config to call; empty if it is.

    target: its name, where it is that of others; is_called: false where a function is passed on as it is.
    """
    is_ours = is_within(home, "ldm")
    is_theirs = home in TRUSTED and not is_ours
    if inspect.isclass(found) and (inspect.isabstract(found) or getattr(found, "_is_protocol", False)):
        return "is abstract; name one of the classes that implement it"
    if inspect.isclass(found) and issubclass(found, BaseException):
        return "is an error, not a part of a model"
    function = found if inspect.isfunction(found) else None
    if inspect.isclass(holder) and not inspect.isclass(found):
        static = inspect.getattr_static(holder, getattr(found, "__name__", ""), None)
        function = static.__func__ if isinstance(static, classmethod | staticmethod) else None
    if not inspect.isclass(found) and function is None:
        return f"is {_kind(found)}, not a class or a function that makes an object"
    for part in filter(None, (holder if inspect.isclass(holder) else None, function or found)):
        is_method = part is function and inspect.isclass(holder)
        if not (part.__module__ == module if is_ours and not is_method else is_within(part.__module__, home)):
            return f"is only imported there; it belongs to {part.__module__}"
    bases = () if any(is_within(target, name) for name in allowed()) else _BY_BASE.get(home, ())
    if bases and inspect.isclass(found) and not set(bases) & set(_bases(found)):
        return f"is no {' or '.join(bases)}; {why_not(target)}"
    is_constructor = not is_theirs and _is_constructor(found, holder, is_ours)
    if function is not None and is_called and not is_constructor:
        return "does not say which class it makes; name a class, or a function with one behind its ->"
    return ""


def may_hold(target: str, made: type) -> bool:
    """Return whether a class that a config names may be given what another node makes."""
    home = _of_others(target)
    if not home or any(is_within(target, name) for name in allowed()):
        return True
    return is_within(made.__module__, home) or _HOLDS.get(home, "torch.nn.Module") in _bases(made)


def _is_constructor(found: Callable[..., Any], holder: Any, is_ours: bool) -> bool:
    """Return whether a function makes an object, and of ours, whether it is one for configs."""
    made, owner = made_by(found), holder if inspect.isclass(holder) else found
    if made is None or (is_ours and f"{owner.__module__}.{owner.__name__}" not in _CONSTRUCTORS):
        return False
    return owner is found or issubclass(made, owner) or issubclass(owner, made)


def made_by(function: Callable[..., Any]) -> type | None:
    """Return the class of what a class or a constructor makes, None if it does not say so."""
    if inspect.isclass(function):
        return function
    try:
        made = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    if made is typing.Self:
        made = getattr(function, "__self__", None)
    made = typing.get_origin(made) or made
    return made if inspect.isclass(made) and made is not type(None) else None


def _bases(found: type) -> list[str]:
    """List the classes from which a class inherits, as one imports them."""
    names = []
    for base in inspect.getmro(found):
        parts = base.__module__.split(".")
        names += [f"{'.'.join(parts[:depth])}.{base.__name__}" for depth in range(1, len(parts) + 1)]
    return names


def _kind(found: Any) -> str:
    return "a module" if inspect.ismodule(found) else f"of type {type(found).__name__}"


def _spec(top: str) -> ModuleSpec | None:
    """Find a package where it is installed, or in the working folder."""
    importlib.invalidate_caches()
    try:
        found = find_spec(top)
    except (ValueError, ImportError):  # a module that was put into sys.modules by hand has no spec
        found = None
    return found or PathFinder.find_spec(top, [os.getcwd()])


def _is_here(top: str) -> bool:
    """Return whether a package lies in the working folder, and none of its name where packages are installed."""
    here = PathFinder.find_spec(top, [os.getcwd()])
    return here is not None and _places(here) == _places(_spec(top))


def _is_own(top: str) -> bool:
    """Return whether a package is somebody's own: there, and neither part of Python nor installed beside it."""
    installed = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    places = _places(_spec(top))
    return top not in sys.stdlib_module_names and bool(places) and not places[0].startswith(tuple(installed))


def _places(spec: ModuleSpec | None) -> list[str]:
    if spec is None:
        return []
    origin = [spec.origin] if spec.has_location else []
    return [os.path.realpath(place) for place in (*origin, *(spec.submodule_search_locations or []))]
