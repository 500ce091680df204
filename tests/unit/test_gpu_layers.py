"""Segments as graphs of layers, padded: what the modules give, the same bits whatever was computed before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_gpu_decode import RATIO, make, prefilled, same_states, tokens  # noqa: F401
from torch import Tensor

from model import Jamba
from model.gpu_layers import GpuLayers, _spans
from model.layered_prefill import LayeredPrefill
from model.state import HybridState
from model.w8a8 import round_activations
from tests.numeric import assert_close, state_bytes


@pytest.fixture
def padding(make, device: str, monkeypatch: pytest.MonkeyPatch) -> Jamba:  # noqa: F811
    """A model that pads 65 to 160 tokens; on a card as it serves, with graphs."""
    monkeypatch.setattr("model.gpu_layers.ROWS", 32)
    monkeypatch.setattr("model.gpu_layers.LONGEST", 160)
    model = make()
    if device != "cpu":
        round_activations(model)
    model.graphed_tokens, model.padded_tokens = 64, 160
    return model


def read(model: Jamba, token_ids: Tensor, state: HybridState, seconds: float | None = None) -> Tensor:
    with torch.inference_mode():
        segment = LayeredPrefill(model, token_ids.to(state.conv.device), state)
        while (logits := segment.run(seconds)) is None:
            pass
    return logits


@pytest.mark.parametrize("t", [65, 66, 95, 96, 97, 150, 160])
def test_padded_segments_equal_the_modules(padding: Jamba, t: int) -> None:
    """Behind a past and without one; without padding to the bit."""
    ids = tokens(1, t, seed=t)[0]
    for past in (0, 21):
        (state,) = prefilled(padding, [past])
        (expected,) = same_states(padding, [state])
        logits = read(padding, ids, state)
        assert padding._gpu_layers is not None and state.num_tokens == past + t
        padding.padded_tokens = 0
        theirs = read(padding, ids, expected)
        padding.padded_tokens = 160
        ratio = RATIO if t % 32 else 0.0
        assert_close("logits", logits, theirs, ratio)
        for name in ("conv", "ssm"):
            assert_close(name, getattr(state, name), getattr(expected, name), ratio)
        kv = (own.read_kv(0, past + t) for own in (state, expected))
        assert_close("KV", *kv, ratio)


def test_the_bits_are_the_same_by_kernels_by_graphs_and_piece_by_piece(padding: Jamba) -> None:
    (state,) = prefilled(padding, [21])
    ids, results = tokens(1, 70)[0], []
    for seconds in (None, None, None, 0.0):
        (own,) = same_states(padding, [state])
        logits = read(padding, ids, own, seconds)
        results.append((logits.cpu(), state_bytes(own)))
        other = padding.new_state()
        read(padding, tokens(1, 96, seed=3)[0], other)  # leaves its rows where the padding of the next one lies
    for logits, after in results[1:]:
        assert torch.equal(logits, results[0][0]) and after == results[0][1]
    if state.conv.is_cuda:
        assert set(padding._gpu_layers._graphs) == {(96, i) for i in range(len(padding._gpu_layers._spans))}


def test_what_is_no_number_goes_with_its_request(padding: Jamba) -> None:
    (state,) = prefilled(padding, [21])
    ids, results = tokens(1, 70)[0], []
    for poison in (False, True):
        (own,) = same_states(padding, [state])
        if poison:
            memory = padding._gpu_layers._memory
            for room in (memory.x, memory.attended, memory.q):
                room.fill_(torch.nan)
        results.append((read(padding, ids, own).cpu(), state_bytes(own)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@torch.no_grad()
def test_only_lengths_between_graphs_and_modules_are_padded(padding: Jamba) -> None:
    assert padding.padded_layers(64) is None and padding.padded_layers(161) is None
    assert isinstance(padding.padded_layers(65), GpuLayers)
    padding.collect_router_stats = True
    assert padding.padded_layers(65) is None


def test_a_segment_that_is_given_up_leaves_its_state_as_it_was(padding: Jamba) -> None:
    (state,) = prefilled(padding, [21])
    (same,) = same_states(padding, [state])
    before, ids = state_bytes(state), tokens(1, 70)[0]
    with torch.inference_mode():
        segment = LayeredPrefill(padding, ids.to(state.conv.device), state)
        assert segment.run(0.0) is None
    del segment
    assert state_bytes(state) == before
    read(padding, ids, padding.new_state())
    assert torch.equal(read(padding, ids, state), read(padding, ids, same))


def test_a_graph_is_of_some_layers_and_ends_at_an_attention() -> None:
    layers = [SimpleNamespace(is_attention=i % 8 == 4) for i in range(16)]
    parts = [[i for i, _ in span] for span in _spans(layers)]
    assert parts == [[0, 1, 2, 3, 4], [4, 5, 6, 7], [8, 9, 10, 11, 12], [12, 13, 14, 15]]
    assert [span[0][1] for span in _spans(layers)] == [False, True, False, True]
