"""Which parameters a class or function takes, those included that its `**kwargs` hands to a parent class."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ldm.config.types import hints_of

_OURS = "ldm."
_OPTIMIZER = ("torch.optim.optimizer", "Optimizer")


@dataclass(frozen=True)
class Parameters:
    """The parameters that a callable takes by name; `open_ended` if it accepts names that cannot be known.

    `hints` holds the annotations of our own callables, `other` that of any further name; those of others are not always
    meant to be taken at their word. `defaults` are the values of those that need not be given.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    open_ended: bool
    hints: dict[str, Any] = field(default_factory=dict)
    other: Any = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def hint(self, name: str) -> Any:
        """Return the annotation of a parameter, None if it has none."""
        return self.hints.get(name, None if name in self.names else self.other)


@dataclass(frozen=True)
class _HandedUp:
    """What a constructor gives to `super().__init__` beside its catch-all; `alone` if it does nothing else with it."""

    names: frozenset[str]
    positions: int
    alone: bool


def given_later(function: Callable[..., Any]) -> tuple[str, ...]:
    """Name the parameters that only a training can give: those of an optimiser, whose node is built when they are."""
    bases = [(base.__module__, base.__name__) for base in getattr(function, "__mro__", ())]
    return ("params", "lr") if _OPTIMIZER in bases else ()


@cache
def parameters_of(function: Callable[..., Any]) -> Parameters:
    """List the parameters of a class or function, those that its `**kwargs` hands to a parent class included.

    A catch-all is followed where the source hands it to `super().__init__`; what the class gives there by itself is no
    parameter of it. Where the source does more with the catch-all, any name is accepted and no parent's is required.
    """
    names: dict[str, None] = {}
    required: list[str] = []
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    given: set[str] = set()  # what the constructors so far give to the next ones by themselves
    positions, is_known = 0, True
    for constructor in _constructors(function) if inspect.isclass(function) else [function]:
        try:
            parameters = list(inspect.signature(constructor).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            break
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given |= set(by_position[:positions])
        own = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
        if is_known:
            required += [p.name for p in own if p.default is p.empty and p.name not in names]
        defaults |= {p.name: p.default for p in own if p.default is not p.empty and p.name not in names}
        names |= dict.fromkeys(p.name for p in own)
        annotations = hints_of(constructor) if (constructor.__module__ or "").startswith(_OURS) else {}
        hints = annotations | hints
        catch_all = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        if catch_all is None:
            return Parameters(tuple(names), tuple(required), not is_known, hints, defaults=defaults)
        handed = _handed_up(constructor, catch_all)
        if handed is None:
            return Parameters(tuple(names), tuple(required), True, hints, annotations.get(catch_all), defaults)
        given |= handed.names
        positions, is_known = handed.positions, is_known and handed.alone
    return Parameters(tuple(names), tuple(required), True, hints, defaults=defaults)


def _constructors(cls: type) -> list[Callable[..., Any]]:
    """The class itself, then the constructors further up that a forwarded `**kwargs` would reach."""
    own = next((base for base in cls.__mro__ if "__init__" in vars(base)), object)
    further = [base.__init__ for base in cls.__mro__[cls.__mro__.index(own) + 1 :] if "__init__" in vars(base)]
    bound = [constructor.__get__(object()) for constructor in further if constructor is not object.__init__]
    return [cls, *bound]


def _handed_up(constructor: Callable[..., Any], catch_all: str) -> _HandedUp | None:
    """Read from its source what a constructor hands up; None if not its catch-all, or if there is no source."""
    try:
        source = inspect.getsource(constructor.__init__ if inspect.isclass(constructor) else constructor)
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return None
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == catch_all]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "super().__init__" and any(word.value in uses for word in call.keywords):
            names = frozenset(word.arg for word in call.keywords if word.arg)
            return _HandedUp(names, len(call.args), alone=len(uses) == 1)
    return None
