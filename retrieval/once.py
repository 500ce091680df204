"""A thread-safe cached property: computed once, on first use, while other threads wait.

From Python 3.12 on, `functools.cached_property` lets several threads compute it at once.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class once(Generic[Value]):
    """If the computation raises, nothing is cached, and the next access computes again."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute, self._name = compute, compute.__name__

    def __get__(self, instance: Any, owner: type) -> Value:
        """Called only until the instance dictionary has the value under the same name."""
        kept = instance.__dict__
        with kept.setdefault(f"lock of {self._name}", threading.Lock()):
            if self._name not in kept:
                kept[self._name] = self._compute(instance)
            return kept[self._name]
