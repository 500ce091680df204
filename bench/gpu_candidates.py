"""What is built and not yet the default, by name, and how each is switched on for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from model import gpu_segment
from model.jamba import Jamba
from model.kernels import gpu_past, gpu_prefill
from model.w8a8 import round_activations

_FLAGS: dict[str, tuple[ModuleType, str, object]] = {
    "short-graphs": (gpu_segment, "ENABLED", True),
    "key-blocks": (gpu_past, "METHOD", "blocks"),
    "triton-attention": (gpu_past, "METHOD", "triton"),
    "unpack-ahead": (gpu_prefill, "OVERLAP", True),
}
_CHANGES: dict[str, Callable[[Jamba], object]] = {"w8a8": round_activations}  # not taken back
CANDIDATES = (*_FLAGS, *_CHANGES)


def switch_on(name: str, model: Jamba) -> None:
    """For this process, or, where the candidate is a change of the model, for the model."""
    if name in _CHANGES:
        _CHANGES[name](model)
    else:
        setattr(*_FLAGS[name])


@contextmanager
def switched_on(name: str, model: Jamba) -> Iterator[None]:
    """For the block; a change of the model stays."""
    before = [(module, field, getattr(module, field)) for module, field, _ in _FLAGS.values()]
    switch_on(name, model)
    try:
        yield
    finally:
        for flag in before:
            setattr(*flag)
