"""A property that is computed at its first use, by one thread while others wait, and then kept.

Unlike `functools.cached_property`, which from Python 3.12 on lets several threads compute it at once.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class once(Generic[Value]):
    """What raises is not kept: the next use computes again."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute, self._name = compute, compute.__name__

    def __get__(self, instance: Any, owner: type) -> Value:
        """Asked only until the value stands in the instance under the same name."""
        kept = instance.__dict__
        with kept.setdefault(f"lock of {self._name}", threading.Lock()):
            if self._name not in kept:
                kept[self._name] = self._compute(instance)
            return kept[self._name]
