"""Targets: what a dotted name means, which parameters it takes, what was probably meant."""

from pathlib import Path

import pytest
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
