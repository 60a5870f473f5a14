"""The JSON schema against the loader: what it accepts and refuses on shipped configs and on mutated ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from ldm.cli import config
from ldm.config import load, read, shipped
from ldm.config.files import read_yaml
from ldm.errors import ConfigError

SCHEMA = shipped.folder().resolve() / "schema.json"
NAMES = [name for name in shipped.names() if not name.startswith("ablation/")]
WRONG = [True, "nonsense", -7, 0.37, [1, "a"], {"a": 1}, [[]]]


@pytest.fixture(scope="module")
def written() -> str:
    """Return what `ldm config schema` writes."""
    with redirect_stdout(StringIO()) as output:
        assert config.main(["schema"]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def validator(written: str) -> jsonschema_rs.Draft7Validator:
    made = json.loads(written)
    jsonschema_rs.meta.validate(made)
    return jsonschema_rs.Draft7Validator(made)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Find the paths of all keys and entries below a plain value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutated(content: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """Change one place below model, training or data; return the result and what was changed."""
    content = copy.deepcopy(content)
    of_plan = ("learning_rate", "base_learning_rate", "global_batch", "allow_untrained_first_stage")  # checks these
    chosen = [path for path in places(content) if path[0] in ("model", "training", "data") and path[1:]]
    path = draw.choice([path for path in chosen if path[1] not in of_plan])
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = draw.choice(["key", "value"]) if isinstance(holder, dict) else "value"
    if kind == "key":
        value = holder.pop(key)
        holder[f"{key}x"] = value
    elif key == "target":
        holder[key] = f"{holder[key]}x"
    else:
        holder[key] = draw.choice([wrong for wrong in WRONG if wrong != holder[key]])
    return content, f"{kind} of {'.'.join(map(str, path))}: {holder.get(key) if isinstance(holder, dict) else holder}"


@cache
def whole(name: str) -> dict[str, Any]:
    """Return a shipped config with all that it is based on."""
    return read(shipped.find(name))


def is_loaded(content: dict[str, Any], file: Path) -> bool:
    file.write_text(yaml.safe_dump(content))
    try:
        load(file)
    except ConfigError:
        return False
    return True


def test_every_shipped_config_names_the_schema_that_lies_beside_it() -> None:
    for file in shipped.folder().rglob("*.yaml"):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        is_study = "ablation" in file.parts
        assert is_study or (
            first.startswith(shipped.SCHEMA) and SCHEMA == (file.parent / first.partition("=")[2]).resolve()
        )


def test_what_lies_there_is_of_today(written: str) -> None:
    assert SCHEMA.read_text(encoding="utf-8") == written, "write it anew: ldm config schema > configs/schema.json"
    assert "ldm.networks.dit.DiT" in json.loads(written)["definitions"]


@pytest.mark.parametrize("name", NAMES)
def test_it_accepts_what_is_shipped(validator: jsonschema_rs.Draft7Validator, name: str) -> None:
    assert [error.message for error in validator.iter_errors(read_yaml(shipped.find(name)))] == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("model", "params", "network", "params", "model_channel"), 64),
        (("model", "params", "network", "params", "model_channels"), 0),
        (("model", "params", "network", "params", "model_channels"), "many"),
        (("model", "params", "network", "target"), "ldm.networks.unet.UNett"),
        (("model", "params", "process", "target"), "ldm.networks.unet.UNet"),
        (("lightning", "trainer", "max_stepz"), 3),
        (("lightning", "compiled"), True),
        (("modell",), {}),
    ],
)
def test_it_refuses_what_no_config_can_mean(validator: Any, path: tuple[str, ...], wrong: Any) -> None:
    content = read_yaml(shipped.folder() / "_base" / "demo_latent.yaml")
    holder = content
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    holder[path[-1]] = wrong
    assert list(validator.iter_errors(content))


def test_values_that_are_still_open_are_accepted(validator: jsonschema_rs.Draft7Validator) -> None:
    content = read_yaml(shipped.find("demo/txt2img_shapes"))
    content["model"]["params"]["network"]["params"]["context_dim"] = "${model.params.conditioner.params.dim}"
    content["data"]["params"]["train"]["params"]["num_samples"] = "???"
    content["lightning"]["callbacks"] = None
    assert not list(validator.iter_errors(content))


COUNTS = [12, pytest.param(300, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.proof)]


@pytest.mark.parametrize("count", COUNTS)
def test_it_agrees_with_the_loader(validator: jsonschema_rs.Draft7Validator, tmp_path: Path, count: int) -> None:
    """What the schema refuses the loader refuses; what the loader refuses in a key or a target, so does the schema."""
    draw, wrong, refused = random.Random(count), [], 0
    for number in range(count):
        name = draw.choice(NAMES)
        content, change = mutated(whole(name), draw)
        errors, loads = list(validator.iter_errors(content)), is_loaded(content, tmp_path / f"{number}.yaml")
        refused += bool(errors)
        is_name = change.startswith("key") or ".target:" in change
        if (errors and loads) or (is_name and not loads and not errors):
            wrong.append((name, change, loads, [error.message[:100] for error in errors[:1]]))
    assert wrong == []
    assert refused > count / 3
