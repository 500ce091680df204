"""The room of a state's KV: how it grows, and where things lie for the kernels that read it by address."""

from __future__ import annotations

from itertools import pairwise

import torch

from model.state import HybridState, StateLayout

LAYOUT = StateLayout(1, 1, 1, 2, 4, 2, 4, torch.float32, torch.float32)


def test_room_doubles_while_small_and_then_grows_by_pieces() -> None:
    state, rooms = HybridState(LAYOUT), []
    while state.capacity < 100_000:
        state.reserve(state.capacity + 1)
        rooms.append(state.capacity)
    assert rooms[:8] == [256 << i for i in range(8)]
    assert {after - before for before, after in pairwise(rooms[7:])} == {16_384}


def test_room_that_is_asked_for_is_not_exceeded() -> None:
    state = HybridState(LAYOUT)
    state.reserve(50_000)
    assert state.capacity == 50_000
    before = state.addresses()
    state.reserve(50_000)
    assert state.addresses() == before


def test_growing_keeps_what_was_seen_and_moves_the_kv_alone() -> None:
    state = HybridState(LAYOUT)
    state.reserve(3)
    k, v = torch.randn(2, 3, 1, 2)
    state.append_kv(0, k, v)
    state.num_tokens = 3
    conv, ssm, kv, _ = state.addresses()
    state.reserve(1000)
    assert state.addresses()[:2] == (conv, ssm) == (state.conv.data_ptr(), state.ssm.data_ptr())
    assert state.addresses()[2] != kv
    assert torch.equal(state.read_kv(0, 3)[0], torch.stack([k, v]))
