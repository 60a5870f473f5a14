"""Targets: what a dotted name means, which parameters it takes, what was probably meant."""

import inspect
from pathlib import Path

import pytest
import pytorch_lightning as pl
from torch import nn

from ldm.config.parameters import parameters_of
from ldm.config.targets import did_you_mean, find_target, missing_parameters
from ldm.errors import ConfigError
from ldm.networks.unet import UNet


class Base:
    """A parent whose parameters reach it through the keyword arguments of its children."""

    def __init__(self, key: str, rate: float = 0.0) -> None:
        self.key, self.rate = key, rate


class Child(Base):
    """Forwards what it does not know."""

    def __init__(self, own: int, **kwargs: object) -> None:
        super().__init__(**kwargs)


class Fixes(Base):
    """Gives its parent a parameter by itself, by name."""

    def __init__(self, own: int = 1, **kwargs: object) -> None:
        super().__init__(key="k", **kwargs)


class FixesFirst(Base):
    """Gives its parent a parameter by itself, by position."""

    def __init__(self, own: int = 1, **kwargs: object) -> None:
        super().__init__("k", **kwargs)


class Grandchild(Fixes):
    """Hands everything on."""

    def __init__(self, further: str = "", **kwargs: object) -> None:
        super().__init__(**kwargs)


class SetsDefault(Base):
    """Changes what it hands on."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("key", "k")
        super().__init__(**kwargs)


class Swallows(Base):
    """Takes any name, for nothing."""

    def __init__(self, own: int, **kwargs: object) -> None:
        super().__init__("k")


class Collects(Base):
    """Takes any name for itself."""

    def __init__(self, **members: object) -> None:
        super().__init__("k")


class Plain(nn.Module):
    """Takes what it says."""

    def __init__(self, width: int) -> None:
        super().__init__()


def test_parameters_reach_through_forwarded_keywords() -> None:
    assert parameters_of(Child).names == ("own", "key", "rate")
    assert parameters_of(Child).required == ("own", "key")
    assert not parameters_of(Child).open_ended


@pytest.mark.parametrize(
    ("cls", "names", "required", "open_ended"),
    [
        (Child, ("own", "key", "rate"), ("own", "key"), False),
        (Fixes, ("own", "rate"), (), False),
        (FixesFirst, ("own", "rate"), (), False),
        (Grandchild, ("further", "own", "rate"), (), False),
        (SetsDefault, ("key", "rate"), (), True),
        (Swallows, ("own",), ("own",), True),
        (Collects, (), (), True),
    ],
)
def test_a_parents_parameters_count_as_far_as_the_class_lets_them_through(
    cls: type, names: tuple[str, ...], required: tuple[str, ...], open_ended: bool
) -> None:
    found = parameters_of(cls)
    assert (found.names, found.required, found.open_ended) == (names, required, open_ended)
    cls(**{name: 1 for name in required})


def test_every_logger_callback_and_strategy_of_lightning_takes_what_it_needs() -> None:
    """A required parameter is one of the class's own signature, unless it hands all on to its parent."""
    for package in (pl.loggers, pl.callbacks, pl.strategies, pl.profilers):
        for cls in (getattr(package, name) for name in package.__all__):
            if isinstance(cls, type):
                own = inspect.signature(cls).parameters
                assert {*parameters_of(cls).required} <= {*own}, cls


def test_open_ended_parameters() -> None:
    assert parameters_of(Collects).open_ended and parameters_of(nn.Identity).open_ended
    assert not parameters_of(Plain).open_ended


def test_find_target() -> None:
    assert find_target("ldm.networks.unet.UNet") is UNet
    assert find_target("ldm.diffusion.discrete.DiscreteVP.linear")(num_steps=3).num_steps == 3


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import a_package_that_is_nowhere", "a.target: cannot be imported: it needs the package a_package"),
        ("from torch import nothing_like_it", "a.target: cannot be imported: cannot import name 'nothing_like_it'"),
    ],
)
def test_an_import_that_fails_for_another_reason_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LDM_ALLOW", "is_broken")
    (tmp_path / "is_broken.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        find_target("is_broken.X", "a")
    assert str(caught.value).startswith(says)


def test_an_exception_while_importing_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LDM_ALLOW", "divides")
    (tmp_path / "divides.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError) as caught:
        find_target("divides.X", "a")
    assert "while importing divides" in caught.value.__notes__[0]


def test_did_you_mean() -> None:
    assert did_you_mean("num_head", ["num_heads", "x"]) == "; did you mean num_heads?"
    assert did_you_mean("Unet", ["UNet"]) == "; did you mean UNet?"
    assert did_you_mean("Prat", ["Path", "Part"]) == "; did you mean Part?"
    assert did_you_mean("abc", ["xyz"]) == ""


def test_missing_parameters() -> None:
    assert str(missing_parameters(["a"], "X", "m.params")) == "m.params: a missing; X needs it"
    assert str(missing_parameters(["a", "b"], "X", "m.params")) == "m.params: a, b missing; X needs them"
