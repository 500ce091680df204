"""A few tokens of one sequence as graphs between the attentions, against the modules: emulated and on a card."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from test_gpu_decode import KINDS, make, prefilled, same_states, tokens  # noqa: F401

from model import Jamba, gpu_segment, jamba
from model.gpu_warm_up import warm_up
from model.w8a8 import round_activations
from tests.numeric import state_bytes


def assert_equals_modules(model: Jamba, monkeypatch: pytest.MonkeyPatch, past: int, lengths: list[int]) -> None:
    """Pieces of these lengths, one behind the other, give the modules' own bits: logits and states."""
    (state,) = prefilled(model, [past])
    (other,) = same_states(model, [state])
    ids = tokens(1, sum(lengths), seed=3)[0]
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for begin, end in pairwise(ends):
        piece = ids[begin:end]
        ours = model.forward_packed(piece, [len(piece)], [state])
        with monkeypatch.context() as patch:
            patch.setattr(jamba.Jamba, "_short_segments", lambda *_: None)
            patch.setattr(jamba.Jamba, "can_try", False)  # in C, where the emulator's host is the device
            assert torch.equal(ours, model.forward_packed(piece, [len(piece)], [other]))
    assert state_bytes(state) == state_bytes(other)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_equal_the_modules(make, monkeypatch, kind: str) -> None:  # noqa: F811
    model = make(**KINDS[kind])
    assert_equals_modules(model, monkeypatch, 70, [5, 2, 9, 5, 5])
    assert model._gpu_segments is not None


def test_a_segment_of_the_greatest_length(make, monkeypatch) -> None:  # noqa: F811
    assert_equals_modules(make(), monkeypatch, 70, [5, gpu_segment.MAX_TOKENS, 5])


def test_where_nothing_is_unpacked_longer_ones_are_graphs_too(make, monkeypatch) -> None:  # noqa: F811
    model = make()
    round_activations(model)
    assert_equals_modules(model, monkeypatch, 70, [5, 70, 128, 70, 5])
    with torch.no_grad():
        assert model._short_segments(128) is not None
        assert model._short_segments(129) is None


def test_segments_of_a_new_sequence(make, monkeypatch) -> None:  # noqa: F811
    assert_equals_modules(make(), monkeypatch, 0, [9, 9, 9, 9])


def test_longer_pieces_several_sequences_and_all_logits_run_as_modules(make) -> None:  # noqa: F811
    model = make()
    with torch.no_grad():
        assert model._short_segments(64) is not None
        assert model._short_segments(65) is None
    a, b = prefilled(model, [3, 3])
    ids = tokens(1, 8)[0].to(a.conv.device)
    assert model.forward_packed(ids, [4, 4], [a, b]).shape[0] == 2
    assert model.forward_packed(ids, [8], [a], logits="all").shape[0] == 8


def test_a_failed_call_leaves_the_state_as_it_was(make, monkeypatch) -> None:  # noqa: F811
    model = make()
    (state,) = prefilled(model, [6])
    before = state_bytes(state)
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.forward_packed(tokens(1, 5)[0], [5], [state])
    assert state_bytes(state) == before


def test_graphs_are_prepared_between_requests(make, monkeypatch) -> None:  # noqa: F811
    """Every length and batch, once; the answers after it are those before it."""
    model = make()
    model.graphed_tokens = 6
    monkeypatch.setattr("model.gpu_warm_up._SEGMENT_TOKENS", (3, 5))
    monkeypatch.setattr("model.gpu_warm_up._PAST_TOKENS", 70)
    for name in ("LENT_UNIT", "_MIN_LENT_TOKENS"):
        monkeypatch.setattr(f"model.state.{name}", 64)
    (state,) = prefilled(model, [6])
    (other,) = same_states(model, [state])
    ids = tokens(1, 5)[0]
    before = model.forward_packed(ids, [5], [state])
    with ThreadPoolExecutor(1) as another_thread:  # as an engine's
        steps = another_thread.submit(lambda: len(list(warm_up(model, max_batch=3)))).result()
    assert steps == 2 + 3 + 5 + 2
    assert torch.equal(model.forward_packed(ids, [5], [other]), before)
    if ids.device != state.conv.device:
        assert set(model._gpu_segments._graphs) == set(range(2, 7))
        assert set(model._gpu_decode._graphs) >= {(1, False), (2, False), (3, False), (2, True), (3, True)}
