"""A prefill in pieces: the same result wherever it is interrupted, and never much longer than it may take."""

from __future__ import annotations

import pytest
import torch

from model import Jamba, layered_prefill
from model.jamba import JambaLayer
from model.layered_prefill import LayeredPrefill
from model.moe import MoE
from tests.numeric import assert_close, state_bytes


def ids(count: int) -> torch.Tensor:
    return torch.randint(1, 500, (count,), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def prefill(model: Jamba, seconds: float | None) -> tuple[torch.Tensor, bytes, int]:
    """(logits, state, calls) of 700 tokens behind 20."""
    state = model.new_state()
    model.forward_packed(ids(20), [20], [state])
    segment, calls = LayeredPrefill(model, ids(700), state), 1
    while (logits := segment.run(seconds)) is None:
        assert state.num_tokens == 20  # nothing counts as seen before the end
        calls += 1
    assert state.num_tokens == 720
    return logits, state_bytes(state), calls


@pytest.mark.parametrize("max_scores", [1 << 29, 300 * 720])
def test_pieces_give_the_same_bits_whatever_comes_between(model, monkeypatch, max_scores):
    monkeypatch.setattr(layered_prefill, "MAX_SCORES", max_scores)
    logits, state, calls = prefill(model, None)
    assert calls == 1
    again, again_state, calls = prefill(model, 0.0)
    queries = 3 if max_scores < 1 << 29 else 1  # 700 in pieces of 256
    attentions = sum(layer.is_attention for layer in model.layers)
    assert calls == 2 * len(model.layers) + attentions * (queries - 1)
    assert torch.equal(again, logits) and again_state == state


@torch.no_grad()
def test_pieces_give_what_a_whole_forward_gives(model, monkeypatch):
    monkeypatch.setattr(layered_prefill, "MAX_SCORES", 1)
    state = model.new_state()
    model.forward_packed(ids(20), [20], [state])
    expected = model.forward_packed(ids(700), [700], [state])
    assert_close("logits", prefill(model, 0.0)[0], expected, 1e-5)


def is_moe(layer: JambaLayer) -> bool:
    return isinstance(layer.feed_forward, MoE)


@torch.no_grad()
def test_a_piece_that_would_take_too_long_waits_for_the_next_call(model, monkeypatch, request):
    """By a clock that goes on a second with every piece of experts and ten with any other."""
    now = 0.0

    def costs(seconds: float):
        def pass_time(*_: object) -> None:
            nonlocal now
            now += seconds

        return pass_time

    monkeypatch.setattr(layered_prefill.time, "perf_counter", lambda: now)
    for layer in model.layers:
        mixer = layer.self_attn.o_proj if layer.is_attention else layer.mamba
        request.addfinalizer(mixer.register_forward_hook(costs(10.0)).remove)
        own = costs(1.0 if is_moe(layer) else 10.0)
        request.addfinalizer(layer.feed_forward.register_forward_hook(own).remove)
    segment, took = LayeredPrefill(model, ids(600), model.new_state()), []
    while True:
        before = now
        if segment.run(12.0) is not None:
            break
        took.append(now - before)
    assert max(took[4:]) <= 12.0  # the first of each kind are not known yet
    assert sum(map(is_moe, model.layers)) and 11.0 in took  # cheap pieces go together with others
