"""Configs: merging, overrides, what validation finds and how it says it, building."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ldm.config import ConfigError, instantiate, load, validate
from ldm.errors import UserError

HERE = __name__


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let configs name what stands in this file."""
    monkeypatch.setenv("LDM_ALLOW", HERE)


class Part(nn.Module):
    """A module with a required and an optional parameter."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


class Whole:
    """Keeps what it is given."""

    made = 0

    def __init__(self, part: object = None, parts: object = (), table: object = None, size: object = 1) -> None:
        type(self).made += 1
        self.part, self.parts, self.table, self.size = part, parts, table, size

    @classmethod
    def square(cls, side: int) -> "Whole":
        """Make one by another way."""
        return cls(size=side**2)


class Base:
    """A parent whose parameters reach it through the keyword arguments of its children."""

    def __init__(self, key: str, rate: float = 0.0) -> None:
        self.key, self.rate = key, rate


class Child(Base):
    """Forwards what it does not know."""

    def __init__(self, own: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.own = own


class Collects(Base):
    """Takes any name for itself."""

    def __init__(self, **members: object) -> None:
        super().__init__("k")
        self.members = members


def refuses(reason: str = "no") -> Whole:
    """Complain as a constructor does about its arguments."""
    raise UserError(f"width: {reason}")


def breaks() -> Whole:
    """Fail in an unforeseen way."""
    raise ZeroDivisionError("division by zero")


NOT_CALLABLE = 3


def node(name: str, **params: object) -> dict:
    return {"target": f"{HERE}.{name}", "params": params}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def message(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ loading and merging


def test_files_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    model = node("Whole", size=1, table={"a": 1, "b": [1, 2]})
    training = {"training": node("Whole", size=1, table={}) | {"learning_rate": 1.0}}
    first = write(tmp_path / "a.yaml", {"model": model, **training, "lightning": {"trainer": {"max_steps": 10}}})
    second = write(tmp_path / "b.yaml", {"model": {"params": {"table": {"a": 2}}}, "training": {"learning_rate": 1e-6}})
    config = load([first, second], ["model.params.size=[3,4]", "model.params.table.b.0=7", "lightning.trainer.x=1e-3"])
    assert isinstance(config, DictConfig)
    assert config.model.params == {"size": [3, 4], "table": {"a": 2, "b": [7, 2]}}
    assert config.training.learning_rate == 1e-6
    assert config.lightning.trainer == {"max_steps": 10, "x": 1e-3}


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"model": node("Whole", size=5, part="${model.params.size}")})
    assert load(path).model.params.part == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("model:\n\ttarget: x", "not valid YAML"),
        ("modle: {target: a.b}", "modle: unknown; did you mean model?"),
        ("model: {params: {}}", "model: needs a target"),
        ("model: 3", "model: needs a target"),
        ("model: {target: a.b, params: '${nowhere}'}", "nowhere"),
        ("model: {target: a.b, params: {x: '???'}}", "model.params.x"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    got = message(load, [path])
    assert got.startswith(f"{path}: ") and says in got


def test_an_absent_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.yaml", {})
    assert (
        message(load, [tmp_path / "trian.yaml"]) == f"{tmp_path / 'trian.yaml'}: no such file; did you mean train.yaml?"
    )


def test_the_file_that_holds_the_mistake_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.yaml", {"model": node("Whole", part=node("Part", width=2))})
    bad = write(tmp_path / "bad.yaml", {"model": {"params": {"part": {"params": {"widht": 3}}}}})
    last = write(tmp_path / "last.yaml", {"model": {"params": {"size": 3}}})
    assert message(load, [good, bad, last]) == f"{bad}: model.params.part.params.widht: unknown; did you mean width?"


def test_a_missing_parameter_is_laid_to_the_file_of_its_node(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.yaml", {"model": node("Whole", part=node("Part", depth=2))})
    other = write(tmp_path / "other.yaml", {"model": {"params": {"size": 3}}})
    says = message(load, [bad, other], ["model.params.part.params.depth=3"])
    assert says.startswith(f"{bad}: model.params.part.params: width missing")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.params.sice=3", "command line: model.params.sice: unknown; did you mean size?"),
        ("model.parms.size=3", "command line: model.parms: unknown; did you mean params?"),
        ("modle.params.size=3", "command line: modle: unknown; did you mean model?"),
        ("model.params.part.params.width.x=3", "command line: model.params.part.params.width.x: cannot be set"),
        ("model.params.size", "command line: 'model.params.size' is no override; write dotted.key=value"),
        ("model.params.parts.5=3", "command line: model.params.parts.5: cannot be set"),
    ],
)
def test_an_override_of_what_does_not_exist(tmp_path: Path, override: str, says: str) -> None:
    path = write(tmp_path / "a.yaml", {"model": node("Whole", part=node("Part", width=2), parts=[1])})
    assert message(load, [path], [override]).startswith(says)


def test_loading_builds_nothing(tmp_path: Path) -> None:
    before = Whole.made
    load(write(tmp_path / "a.yaml", {"model": node("Whole", part=node("Whole"))}))
    assert Whole.made == before


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (node("Part", widht=1), "m.params.widht: unknown; did you mean width?"),
        (node("Part", width=1, zzzzz=1), "m.params.zzzzz: unknown; "),
        (node("Part", depth=1), f"m.params: width missing; {HERE}.Part needs it"),
        (node("Whole", part=node("Part")), "m.params.part.params: width missing"),
        (node("Whole", parts=[node("Part", width=1), node("Part", w=1)]), "m.params.parts[1].params.w: unknown"),
        (node("Whole", table={"a": {"b": node("Part", x=1)}}), "m.params.table.a.b.params.x: unknown"),
        (node("Whole", part={"params": {"width": 1}}), "m.params.part: needs a target"),
        ({"target": f"{HERE}.Part", "parms": {"width": 1}}, "m.parms: unknown; did you mean params?"),
        ({"target": f"{HERE}.Part", "params": [1]}, "m.params: must map"),
        ({"target": f"{HERE}.Part", "params": {"width": 1}, "ignore_keys": ["a"]}, "m.ignore_keys: has no effect"),
        (node("Prat", width=1), f"m.target: {HERE} has no Prat; did you mean Part?"),
        (node("Whole.sqare", side=1), f"m.target: {HERE}.Whole has no sqare; did you mean square?"),
        (node("Whole.square", sid=1), "m.params.sid: unknown; did you mean side?"),
        (node("NOT_CALLABLE"), f"m.target: {HERE}.NOT_CALLABLE is of type int, not a class or a function"),
        ({"target": "ldm.networks.unett.UNet"}, "m.target: ldm.networks has no unett; did you mean unet?"),
        ({"target": "ldm.networks.unet"}, "m.target: ldm.networks.unet is a module, not a class or a function"),
        ({"target": "pytroch_lightning.callbacks.Timer"}, "m.target: pytroch_lightning.callbacks.Timer is unk"),
        ({"target": "pytroch_lightning.Trainer"}, "m.target: pytroch_lightning.Trainer cannot be called: there is no"),
        ({"target": "UNet"}, "m.target: 'UNet' is not an import path"),
        ({"target": 3}, "m.target: 3 is not an import path"),
        (node("Child", own=1), "m.params: key missing"),
        (node("Child", own=1, key="a", rat=0.1), "m.params.rat: unknown; did you mean rate?"),
    ],
)
def test_validation_names_the_place_and_the_nearest_name(bad: dict, says: str) -> None:
    assert message(validate, bad, "m").startswith(says)
    assert message(instantiate, bad, "m").startswith(says)


def test_what_is_right_passes() -> None:
    validate(node("Child", own=1, key="a", rate=0.5))
    validate(node("Collects", anything=1, goes=2))
    validate({"target": "torch.nn.Identity", "params": {"x": 1}})
    validate(node("Part", depth=2), provided=["width"])
    validate({"target": "torch.nn.Identity", "params": {"a": 1}})
    validate([node("Part", width=1), {"free": {"form": 1}}, 3, None])


@pytest.mark.parametrize(
    ("values", "place"), [({"flip": -0.5}, "flip"), ({"size": 0}, "size"), ({"size": [8, -8]}, "size")]
)
def test_bounds_are_those_that_a_constructor_states(values: dict, place: str) -> None:
    maps = {"root": "a", "target_root": "b", "size": 8, "num_classes": 4, "ignore_index": -1}
    target = "ldm.data.image_pairs.paired.PairedFolder"
    validate({"target": target, "params": maps})
    assert message(validate, {"target": target, "params": maps | values}, "m").startswith(f"m.params.{place}: ")


# ----------------------------------------------------------------------------------------------------------- building


def test_children_are_built_first_and_nothing_sees_a_config() -> None:
    config = OmegaConf.create(
        node(
            "Whole", part=node("Part", width=2), parts=[node("Part", width=1), 5], table={"a": [1], "b": node("Whole")}
        )
    )
    whole = instantiate(config)
    assert isinstance(whole.part, Part) and isinstance(whole.parts[0], Part) and whole.parts[1] == 5
    assert isinstance(whole.table["b"], Whole)
    for value in (whole.parts, whole.table, whole.table["a"]):
        assert type(value) in (list, dict) and not isinstance(value, (DictConfig, ListConfig))


def test_targets_may_be_methods_and_functions_and_params_may_be_absent() -> None:
    assert instantiate(node("Whole.square", side=4)).size == 16
    assert isinstance(instantiate({"target": "torch.nn.Identity"}), nn.Identity)
    assert instantiate({"target": f"{HERE}.Whole", "params": None}).size == 1


def test_extra_parameters_and_objects_pass_through() -> None:
    tensor = torch.ones(2)
    assert instantiate(node("Whole", size=tensor), part=tensor).part is tensor
    assert instantiate(node("Part"), "m", width=3).layers[0].in_features == 3
    assert instantiate(None) is None


def test_a_complaint_of_a_constructor_gets_the_path() -> None:
    assert message(instantiate, node("Whole", part=node("refuses")), "model") == "model.params.part: width: no"


def test_another_exception_keeps_its_type_and_names_the_node() -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        instantiate(node("Whole", parts=[1, node("breaks")]), "model")
    assert caught.value.__notes__ == [f"while building model.params.parts[1]: {HERE}.breaks"]


# -------------------------------------------------------------------------------------------------------- checkpoints


def saved(path: Path, width: int = 2) -> tuple[Path, Part]:
    part = Part(width)
    torch.save({"state_dict": part.state_dict()}, path)
    return path, part


def test_a_node_with_a_checkpoint_is_filled(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    path, part = saved(tmp_path / "a.ckpt")
    built = instantiate(node("Whole", part={**node("Part", width=2), "checkpoint": str(path)}))
    assert torch.equal(built.part.layers[0].weight, part.layers[0].weight)
    assert "loaded 2 tensors into Part" in caplog.text


def test_ignored_keys_stay_as_built(tmp_path: Path) -> None:
    path, part = saved(tmp_path / "a.ckpt")
    built = instantiate({**node("Part", width=2), "checkpoint": str(path), "ignore_keys": ["layers.0.bias"]})
    assert torch.equal(built.layers[0].weight, part.layers[0].weight)
    assert not torch.equal(built.layers[0].bias, part.layers[0].bias)


def test_an_absent_checkpoint_is_found_before_anything_is_built(tmp_path: Path) -> None:
    before, path = Whole.made, tmp_path / "absent.ckpt"
    config = node("Whole", part=node("Whole"), parts=[{**node("Part", width=2), "checkpoint": str(path)}])
    assert message(instantiate, config, "m").startswith(f"m.params.parts[0].checkpoint: {path}: no such checkpoint")
    assert Whole.made == before


def test_a_checkpoint_that_does_not_fit_names_the_node(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "a.ckpt", width=3)
    says = message(instantiate, {**node("Part", width=2), "checkpoint": str(path)}, "m")
    assert says.startswith(f"m.checkpoint: {path}: does not fit Part: layers: 2 of another shape")


def test_only_modules_have_checkpoints(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "a.ckpt")
    assert "holds no weights" in message(instantiate, {**node("Whole"), "checkpoint": str(path)}, "m")


def test_on_the_meta_device_nothing_is_read() -> None:
    with torch.device("meta"):
        built = instantiate({**node("Part", width=2), "checkpoint": "nowhere.ckpt"})
    assert built.layers[0].weight.is_meta
