"""Reading the parameters of a foreign node: every key is taken, dropped by name, or reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ldm.config.targets import did_you_mean, is_slip, missing_parameters
from ldm.errors import ConfigError

Node = dict[str, Any]
REQUIRED: Any = object()


class Params:
    """The parameters of one foreign node, to be consumed; `close` reports what was neither taken nor dropped."""

    def __init__(self, node: Node, path: str, translate: TranslateNode) -> None:
        self.target = str(node["target"])
        self.node_path = path
        self.translate = translate
        self.path = f"{path}.params" if path else "params"
        values = node.get("params")
        if not isinstance(values, dict | None):
            raise ConfigError("must map parameter names to values", self.path)
        self._left = dict(values or {})
        self._known: list[str] = []

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Return the value of a parameter and mark it as used; without a default it has to be there."""
        self._known.append(name)
        if default is REQUIRED:
            self.require(name)
        return self._left.pop(name, default)

    def require(self, *names: str) -> None:
        """Insist on parameters that are about to be taken."""
        absent = [name for name in names if name not in self._left]
        if absent:
            raise missing_parameters(absent, self.target, self.path)

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of the named parameters that are set; `old>new` renames one."""
        pairs = (name.partition(">") for name in names)
        renamed = {old: new or old for old, _, new in pairs}
        self._known += renamed
        return {new: self._left.pop(old) for old, new in renamed.items() if old in self._left}

    def with_default(self, name: str, value: Any) -> Params:
        """Set a parameter that is not set."""
        self._left.setdefault(name, value)
        return self

    def drop(self, *names: str) -> None:
        """Discard parameters that say nothing about what is built here."""
        self._known += names
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, allowed: Any, reason: str, *others: Any) -> None:
        """Discard a parameter that may have one value, or `others` that say the same; else an error with a reason."""
        value = self.take(name, allowed)
        if value != allowed and value not in others:
            raise self.error(name, f"{value!r} is not supported: {reason}")

    def off(self, *names: str) -> None:
        """Discard switches that are off: absent, false, null, or a list of such. ConfigError for one that is on."""
        for name in names:
            value = self.take(name, None)
            if any(value if isinstance(value, list) else [value]):
                raise self.error(name, f"{value!r} is not supported; only what leaves it switched off")

    def uniform(self, *names: str) -> None:
        """Read lists of equal numbers, one a level, as the number. ConfigError for numbers that differ."""
        for name in names:
            values = self._left.get(name)
            if isinstance(values, list) and values:
                if any(value != values[0] for value in values):
                    raise self.error(
                        name, f"{values} differ between levels, which is not supported; only equal numbers"
                    )
                self._left[name] = values[0]

    def choose(self, name: str, default: Any, choices: dict[Any, Any]) -> Any:
        """Take a parameter and look it up among its allowed values."""
        value = self.take(name, default)
        if value not in choices:
            raise self.error(name, f"{value!r} is unknown; choose one of {', '.join(map(str, choices))}")
        return choices[value]

    def __contains__(self, name: str) -> bool:
        """Return whether a parameter is set and not yet taken."""
        return name in self._left

    def peek(self, name: str, default: Any = None) -> Any:
        """Look at a parameter without using it up."""
        return self._left.get(name, default)

    def child(self, name: str, *, using: Translate | None = None) -> Any:
        """Take a parameter that is a node, translated by the table or by `using`."""
        value = self.take(name)
        if using is None or not isinstance(value, dict):
            return self.translate(value, self.at(name))
        return apply(using, value, self.at(name), self.translate)

    def inside(self, name: str, default: Any = REQUIRED) -> Params:
        """Take a parameter that is a plain mapping, as parameters to be consumed in turn."""
        inner = Params({"target": self.target, "params": self.take(name, default)}, self.node_path, self.translate)
        inner.path = self.at(name)
        return inner

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._left))

    def at(self, name: str) -> str:
        """Return the path of a parameter."""
        return f"{self.path}.{name}"

    def error(self, name: str, problem: str) -> ConfigError:
        """Make an error about one parameter."""
        return ConfigError(problem, self.at(name))

    def close(self) -> None:
        """Report the first parameter that nothing has asked for."""
        for name in self._left:
            known = f"; {self.target} takes {', '.join(self._known) or 'nothing'}"
            slips = [meant for meant in self._known if is_slip(str(name), meant)]
            raise self.error(name, f"unknown{did_you_mean(str(name), slips) or known}")


Translate = Callable[[Params], Node]
TranslateNode = Callable[[Any, str], Any]


def apply(translate: Translate, foreign: Node, path: str, translate_child: TranslateNode) -> Node:
    """Translate one foreign node; what stands beside target and params is kept, what is left over reported."""
    p = Params(foreign, path, translate_child)
    built = translate(p)
    p.close()
    beside = {key: value for key, value in foreign.items() if key not in ("target", "params")}
    return {**built, **beside}


def node(target: str, **params: Any) -> Node:
    """Make a node of our dialect."""
    return {"target": target, "params": params}


def renaming(target: str, *names: str, drop: tuple[str, ...] = ()) -> Translate:
    """Make a translation that only renames: `same`, `old>new`; defaults have to agree on both sides."""

    def translate(p: Params) -> Node:
        p.drop(*drop)
        return node(target, **p.given(*names))

    return translate


def unavailable(reason: str) -> Translate:
    """Make a translation that refuses the target and says why."""

    def translate(p: Params) -> Node:
        raise ConfigError(f"{p.target} is not available: {reason}", f"{p.node_path}.target".lstrip("."))

    return translate
