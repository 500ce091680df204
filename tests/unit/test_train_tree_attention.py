"""Attention over a tree of keys: the kernel against the definition, task by task."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from model.train.tree_attention import Tree, tree_attention_ref, tree_attention_triton
from tests.numeric import assert_close


@pytest.mark.parametrize(
    ("passages", "tasks", "shared", "length", "padded", "heads", "first", "tokens"),
    [
        (3, 5, 70, 90, 20, 6, 0, 20),  # prefill: a tile of rows has several tasks
        (2, 2, 64, 64, 80, 12, 0, 80),  # a task has several tiles, more own keys than a block
        (2, 5, 130, 33, 12, 12, 15, 1),  # a step: one token each, behind some that were said
        (1, 1, 5, 3, 2, 2, 0, 2),
    ],
)
def test_kernel_is_the_definition(
    passages: int, tasks: int, shared: int, length: int, padded: int, heads: int, first: int, tokens: int
) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rng = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    lengths = torch.randint(1, length + 1, (passages,), generator=rng)
    pad = torch.randint(0, padded, (passages, tasks), generator=rng)
    own = draw(2, 2, passages, tasks, 2, padded + 8, 16)[0]  # as a layer's keys lie in all layers'
    keys = draw(2, 2, shared, 16), draw(2, passages, 2, length, 16)
    tree = Tree(keys[0], keys[1], own, lengths.to(device), pad.to(device))
    q, places = draw(passages, tasks, tokens, heads, 16), torch.arange(first, first + tokens, device=device)
    out, expected = (f(q, tree, places) for f in (tree_attention_triton, tree_attention_ref))
    real = places >= tree.pad[..., None]
    assert real.any()
    assert_close("attention", out[real], expected[real], ratio=1e-5 if device == "cpu" else 1e-2)
