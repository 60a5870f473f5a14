"""Prove that a mistake in a config is refused in one line, or is none: change shipped configs at random places.

Every mutated file goes the way of `main.py --dry-run` (plan, model on the meta device), builds callbacks and loggers as
well, and the data where they are generated. Judged by what was done to the file, not by the code that checks it:

    misspelt, unknown or hostile target, wrong type, negative, dangling     must be refused (exceptions are named below)
    null, dropped                                                 accepted only where the parameter has a default
    other number, absurd number                                   either; if accepted, the plan must hold that number

A refusal counts if it is one line that names the place; a traceback, or anything else, is a failure.

    python scripts/benchmarks/prove_configs.py --mutations 1000 --seed 0 --out mutations.json
"""

import argparse
import inspect
import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.cli.arguments import parse
from ldm.cli.train import plan_of
from ldm.config import instantiate
from ldm.config.files import follow_references, read_with_bases
from ldm.config.targets import find_target
from ldm.errors import UserError
from ldm.training.plan import Plan
from ldm.training.run import instantiate_training
from ldm.training.trainer import build_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ON_CPU = ("--accelerator", "cpu", "--devices", "1")
FREE_NAMES = ("lightning.callbacks", "lightning.logger")  # any name may stand below these
# Where a negative number has a meaning, or only shifts something.
NEGATIVE_IS_FINE = ("max_steps", "max_epochs", "logvar_init", "seed", "latent_scale", "guidance_scale")
HOSTILE = ("os.system", "subprocess.Popen", "torch.load", "ldm.training.run_folder.os.system", "ldm.cli.program.main")
NOWHERE = "nowhere.to_be_found"
BOTH_ARE_FINE = ("latent_scale",)  # a word or a number
Place = tuple[Any, ...]  # keys and positions from the top


@dataclass(frozen=True)
class Verdict:
    """One mutation, and whether the program reacted rightly."""

    config: str
    path: str
    kind: str
    change: str
    outcome: str
    message: str
    right: bool


# ------------------------------------------------------------------------------------------------------- mutations


def places(node: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every value below a node with its place."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*place, key), value
        yield from places(value, (*place, key))


def misspell(word: str, rng: random.Random) -> str:
    """Leave out, double or swap letters."""
    at = rng.randrange(len(word) - 1)
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return rng.choice([word[:at] + word[at + 1 :], word[: at + 1] + word[at:], swapped])


def wrong_type(value: Any, rng: random.Random) -> Any:
    """Return a value of a kind that nobody could mean here."""
    around = [[value], {"value": value}]
    if isinstance(value, bool):
        return rng.choice(["perhaps", *around])
    if isinstance(value, int):
        return rng.choice(["seven", value + 0.5, *around])
    if isinstance(value, float):
        return rng.choice(["seven", str(value), *around])
    return rng.choice([7, *around] if isinstance(value, str) else ["seven", 7])


def mutate(config: dict[str, Any], rng: random.Random) -> tuple[str, Place, dict[str, Any]]:
    """Change one random place; return the kind of change, the place and the new config."""
    while True:
        place, value = rng.choice(list(places(config)))
        kind = rng.choice(list(KINDS))
        new = deepcopy(config)
        parent = new
        for key in place[:-1]:
            parent = parent[key]
        if KINDS[kind](parent, place[-1], value, rng) and new != config:
            return kind, place, new


def _misspelt(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if not isinstance(key, str) or len(key) < 3:
        return False
    new = misspell(key, rng)
    if new in parent:
        return False
    parent[new] = parent.pop(key)
    return True


def _unknown_target(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if key != "target":
        return False
    parts = value.split(".")
    at = rng.randrange(len(parts))
    parts[at] = misspell(parts[at], rng)
    parent[key] = ".".join(parts)
    return True


def _hostile_target(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if key != "target":
        return False
    parent[key] = rng.choice(HOSTILE)
    return True


def _wrong_type(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if (
        value is None or "${" in str(value) or key in BOTH_ARE_FINE
    ):  # the type of a reference is that of what it refers to
        return False
    parent[key] = wrong_type(value, rng)
    return True


def _dropped(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    del parent[key]
    return True


def _null(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    parent[key] = None
    return isinstance(parent, dict)


def _negative(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if type(value) not in (int, float) or value <= 0:
        return False
    parent[key] = -value
    return True


def _other_number(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if type(value) is not int or value < 1:
        return False
    parent[key] = rng.randint(1, 2 * value)
    return True


def _absurd_number(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    if type(value) is not int:
        return False
    parent[key] = 10 ** rng.randint(7, 30)
    return True


def _dangling(parent: Any, key: Any, value: Any, rng: random.Random) -> bool:
    parent[key] = f"${{{NOWHERE}}}"
    return True


KINDS: dict[str, Callable[[Any, Any, Any, random.Random], bool]] = {
    "misspelt": _misspelt,
    "unknown target": _unknown_target,
    "hostile target": _hostile_target,
    "wrong type": _wrong_type,
    "dropped": _dropped,
    "null": _null,
    "negative": _negative,
    "other number": _other_number,
    "absurd number": _absurd_number,
    "dangling": _dangling,
}


# --------------------------------------------------------------------------------------------------------- judging


def path_of(place: Place) -> str:
    """Write a place as messages do."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")


def names_place(message: str, place: Place) -> bool:
    """Return whether a message names the changed key, the node around it, or the reference that leads nowhere."""
    around = [path_of(place[:length]) for length in range(1, len(place) + 1)]
    return any(word in message for word in (str(place[-1]), NOWHERE)) or any(
        f"{path}:" in message or f"{path}." in message for path in around
    )


def at(config: Any, place: Place) -> Any:
    """Return the value at a place, which must exist."""
    for key in place:
        config = config[key]
    return config


def has_default(config: dict[str, Any], place: Place, null: bool) -> bool:
    """Return whether the value at a place may be left out (or null), since it has a default (that is None)."""
    if len(place) < 2 or place[-2] != "params":
        return True  # a whole node, its params, or what lies in a list: judged by what is built
    node = at(config, place[:-2])
    target = node.get("target") if isinstance(node, dict) else None
    if target is None:
        return True
    parameter = inspect.signature(find_target(target)).parameters.get(place[-1])
    if parameter is None or parameter.default is parameter.empty:
        return parameter is None
    return not null or parameter.default is None or "None" in str(parameter.annotation)


def is_right(config: dict[str, Any], kind: str, place: Place, plan: Plan, new: dict[str, Any]) -> bool:
    """Judge an accepted mutation."""
    if kind in ("other number", "absurd number"):
        return place == ("training", "global_batch") or at(plan.config, place) == at(new, place)
    if kind in ("dropped", "null"):
        return has_default(config, place, null=kind == "null")
    if kind == "negative":
        return place[-1] in NEGATIVE_IS_FINE
    if kind == "misspelt":
        return path_of(place[:-1]) in FREE_NAMES or is_same_pattern(config, place, new)
    return False


def is_same_pattern(config: dict[str, Any], place: Place, new: dict[str, Any]) -> bool:
    """Return whether a key is a pattern of parameters' names that, misspelt, still takes those that it took."""
    (changed,) = at(new, place[:-1]).keys() - at(config, place[:-1]).keys()
    return place[-2] == "learning_rates" and fnmatch(place[-1].replace("*", "any.name"), changed)


def data_problem(data: dict[str, Any]) -> str:
    """Return what is wrong with data: absent files, if nothing else; nothing where they are generated."""
    try:
        instantiate(data, "data")
    except UserError as error:
        return str(error)
    return ""


@cache
def unchanged(name: str) -> tuple[str, str]:
    """Return the sections of a shipped config that are built, and what is wrong with its data (no files here)."""
    plan = plan_of(parse(["--base", str(CONFIGS / name), *ON_CPU]))
    return built_sections(plan), data_problem(plan.config["data"])


def built_sections(plan: Plan) -> str:
    """Return the resolved sections `model` and `training` as text."""
    return json.dumps([plan.model, plan.training], default=str)


def start(name: str, file: Path) -> Plan:
    """Go as far as a run can go without data, devices and weights. Raises whatever is raised."""
    plan = plan_of(parse(["--base", str(file), *ON_CPU, "--logdir", str(file.parent)]))
    if built_sections(plan) != unchanged(name)[0]:
        with torch.device("meta"):
            instantiate_training(plan.config)
    build_trainer(plan)
    problem = data_problem(plan.config["data"])
    if problem and problem != unchanged(name)[1]:
        raise UserError(problem)
    return plan


def judge(name: str, config: dict[str, Any], rng: random.Random, folder: Path) -> Verdict:
    """Mutate a config and see what becomes of it."""
    kind, place, new = mutate(config, rng)
    file = folder / "mutated.yaml"
    file.write_text(yaml.safe_dump(new, sort_keys=False))
    before = at(config, place)
    after = "" if kind in ("dropped", "misspelt") else repr(at(new, place))
    if kind == "misspelt":
        after = f"renamed to {(set(at(new, place[:-1])) - set(at(config, place[:-1]))).pop()}"
    change = f"{str(before)[:60]} -> {after[:60]}"
    try:
        plan = start(name, file)
    except UserError as error:
        message = str(error)
        right = "\n" not in message and names_place(message, place)
        return Verdict(name, path_of(place), kind, change, "refused", message, right)
    except Exception as error:  # noqa: BLE001 - what a user would see as a traceback is what is looked for
        return Verdict(name, path_of(place), kind, change, "crashed", f"{type(error).__name__}: {error}", False)
    return Verdict(name, path_of(place), kind, change, "accepted", "", is_right(config, kind, place, plan, new))


def whole(name: str) -> dict[str, Any]:
    """Return a shipped config with what it is based on, as a single file would hold it."""
    return follow_references(read_with_bases(CONFIGS / name)).content


def verdicts(mutations: int, seed: int) -> list[Verdict]:
    """Try as many mutations as asked for, over all configs in turn."""
    names = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    names = [name for name in names if not name.startswith(("_base/", "ablation/"))]  # no configs of their own
    contents = {name: whole(name) for name in names}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        chosen = (rng.choice(names) for _ in range(mutations))
        return [judge(name, contents[name], rng, Path(folder)) for name in chosen]


def summary(found: list[Verdict]) -> list[str]:
    """Count by kind."""
    lines = [f"{'kind':16} {'tried':>6} {'refused':>8} {'accepted':>9} {'wrong':>6}"]
    for kind in [*KINDS, "all"]:
        chosen = [verdict for verdict in found if kind in (verdict.kind, "all")]
        outcomes, wrong = Counter(verdict.outcome for verdict in chosen), sum(not v.right for v in chosen)
        lines.append(f"{kind:16} {len(chosen):6} {outcomes['refused']:8} {outcomes['accepted']:9} {wrong:6}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Try, print and write; status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every verdict to this JSON file")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    found = verdicts(options.mutations, options.seed)
    wrong = [verdict for verdict in found if not verdict.right]
    for verdict in wrong:
        print(f"WRONG {verdict.config} {verdict.path} ({verdict.kind}: {verdict.change})")
        print(f"      {verdict.outcome} {verdict.message}")
    print("\n".join(summary(found)))
    if options.out:
        options.out.write_text(json.dumps([asdict(verdict) for verdict in found], indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
