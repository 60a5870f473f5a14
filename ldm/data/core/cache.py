"""A cache that is bounded by the size of its values rather than by their number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["SizedCache"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SizedCache(Generic[Key, Value]):
    """Keep the values used last, up to `capacity` as `size_of` measures them, and always the newest one.

    A pickled copy is empty, so that workers start without the values of their parent.
    """

    def __init__(self, capacity: int, size_of: Callable[[Value], int]) -> None:
        self.capacity, self.size_of = capacity, size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._size = 0

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """Return the value of a key; `make(key)` is called if it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make(key)
        self._size += self.size_of(value)
        while self._size > self.capacity and len(self._values) > 1:
            self._size -= self.size_of(self._values.popitem(last=False)[1])
        return value

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size(self) -> int:
        """Return the size of all values that are kept."""
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": OrderedDict(), "_size": 0}
