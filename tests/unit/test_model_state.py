"""A state is all there is to know of the tokens before: cut anywhere, in any company, to bytes and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import HybridState, Jamba, StateLayout, load_model
from tests.numeric import assert_close, state_bytes, state_of

RATIO = 1e-5
MODELS = [(torch.float32, None), (torch.float32, "int8"), (torch.bfloat16, None)]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 512, (1, 128), generator=torch.Generator().manual_seed(1))


def run(model: Jamba, parts: list[Tensor]) -> tuple[Tensor, HybridState]:
    state = model.new_state()
    return torch.cat([model(part, state) for part in parts], dim=1), state


def assert_same_state(ours: HybridState, expected: HybridState, ratio: float = RATIO) -> None:
    assert ours.num_tokens == expected.num_tokens and ours.layout == expected.layout
    assert_close("conv", ours.conv, expected.conv, ratio)
    assert_close("ssm", ours.ssm, expected.ssm, ratio)
    assert_close("KV", ours.read_kv(0, ours.num_tokens), expected.read_kv(0, expected.num_tokens), ratio)


@pytest.mark.parametrize("split", [1, 2, 3, 4, 63, 64, 127])  # 1-4 straddle the conv window, w-1 = 3
def test_prefill_in_two_segments_equals_one(model: Jamba, tokens: Tensor, split: int) -> None:
    whole, one_call = run(model, [tokens])
    parts, two_calls = run(model, [tokens[:, :split], tokens[:, split:]])
    assert_close("logits", parts, whole, RATIO)
    assert_same_state(two_calls, one_call)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_prefill_in_any_segments_equals_one(model: Jamba, lengths: list[int]) -> None:
    tokens = torch.randint(0, 512, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    whole, one_call = run(model, [tokens])
    parts, many_calls = run(model, list(tokens.split(lengths, dim=1)))
    assert_close("logits", parts, whole, RATIO)
    assert_same_state(many_calls, one_call)


def test_kv_grows_past_its_first_room(model: Jamba) -> None:
    tokens = torch.randint(0, 512, (1, 530), generator=torch.Generator().manual_seed(2))
    whole, one_call = run(model, [tokens])
    parts, many_calls = run(model, list(tokens.split([250, 5, 1, 1, 200, 73], dim=1)))
    assert_close("logits", parts, whole, RATIO)
    assert_same_state(many_calls, one_call)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(calls=st.lists(st.lists(st.sampled_from([1, 1, 2, 7, 33]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_sequences_of_different_lengths_equal_each_alone(model: Jamba, calls: list[list[int]]) -> None:
    """Prefill segments and decode steps in one call, some of equal length and some not."""
    generator = torch.Generator().manual_seed(3)
    together, alone = [model.new_state() for _ in range(3)], [model.new_state() for _ in range(3)]
    for lengths in calls:
        packed = torch.randint(0, 512, (sum(lengths),), generator=generator)
        logits = model.forward_packed(packed, lengths, together, logits="all")
        parts = zip(packed.split(lengths), alone, strict=True)
        expected = torch.cat([model(own[None], state)[0] for own, state in parts])
        assert_close("logits", logits, expected, RATIO)
    for ours, expected in zip(together, alone, strict=True):
        assert_same_state(ours, expected)


def test_last_logits_are_the_last_of_all(model: Jamba, tokens: Tensor) -> None:
    lengths, packed = [5, 1, 60], tokens[0, :66]
    every = model.forward_packed(packed, lengths, [model.new_state() for _ in lengths], logits="all")
    last = model.forward_packed(packed, lengths, [model.new_state() for _ in lengths], logits="last")
    assert_close("packed", last, every[[4, 5, 65]], RATIO)
    assert_close("fresh", model(packed[None], logits="last"), model(packed[None])[:, -1], RATIO)


@pytest.mark.parametrize(("dtype", "quantize"), MODELS)
def test_a_state_comes_back_from_bytes_bit_for_bit(
    tiny_jamba_dir: Path, tokens: Tensor, dtype: torch.dtype, quantize: str | None
) -> None:
    model = load_model(tiny_jamba_dir, dtype=dtype, quantize=quantize)
    _, state = run(model, [tokens[:, :77]])
    data = state_bytes(state)
    again = state_of(state.layout, data)
    assert state_bytes(again) == data
    assert torch.equal(model(tokens[:, 77:], again), model(tokens[:, 77:], state))


def test_an_empty_state_comes_back_from_bytes(model: Jamba, tokens: Tensor) -> None:
    empty = model.new_state()
    again = state_of(empty.layout, state_bytes(empty))
    assert torch.equal(model(tokens, again), model(tokens, empty))


def test_a_snapshot_with_its_kv_restores_the_state(model: Jamba, tokens: Tensor) -> None:
    _, state = run(model, [tokens[:, :70]])
    snapshot, kv = state.snapshot(), [state.read_kv(0, 64), state.read_kv(64, 70)]
    expected = model(tokens[:, 70:], state)
    assert snapshot.num_tokens == 70, "a snapshot does not go on with its state"
    again = model.new_state()
    again.restore(snapshot, kv)
    assert torch.equal(model(tokens[:, 70:], again), expected)
    assert state_bytes(again) == state_bytes(state)


def test_restore_refuses_what_does_not_fit(model: Jamba, tokens: Tensor) -> None:
    _, state = run(model, [tokens[:, :70]])
    snapshot, kv, empty = state.snapshot(), state.read_kv(0, 70), model.new_state()
    with pytest.raises(ValueError, match="KV of 69 tokens does not cover the snapshot's 70"):
        empty.restore(snapshot, [kv[:, :, :69]])
    with pytest.raises(ValueError, match="KV is"):
        empty.restore(snapshot, [kv.bfloat16()])
    with pytest.raises(ValueError, match="needs an empty state"):
        state.restore(snapshot, [kv])
    with pytest.raises(ValueError, match=r"tokens 0\.\.71 asked of a state that has seen 70"):
        state.read_kv(0, 71)
    assert empty.num_tokens == 0
    empty.restore(snapshot, [kv])


def test_a_call_refuses_states_that_do_not_belong(model: Jamba, tokens: Tensor) -> None:
    state = model.new_state()
    for lengths, states in (
        ([2, 2], [state, state]),
        ([4], []),
        ([0, 4], [state, model.new_state()]),
        ([3], [state]),
    ):
        with pytest.raises(ValueError, match=r"sequences need|lengths"):
            model.forward_packed(tokens[0, :4], lengths, states)
    foreign = HybridState(StateLayout.of(model.config, torch.bfloat16))
    with pytest.raises(ValueError, match="another shape or dtype"):
        model(tokens, foreign)
    assert state.num_tokens == foreign.num_tokens == 0


def test_states_cross_the_border_of_inference_mode(model: Jamba, tokens: Tensor) -> None:
    with torch.inference_mode():
        _, state = run(model, [tokens[:, :40]])
    outside = model(tokens[:, 40:], state)
    assert_close("logits", outside, run(model, [tokens])[0][:, 40:], RATIO)
