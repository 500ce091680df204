import hashlib
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.prefix_plan import PlanSettings, choose_snapshots, plan_prefix, root_key, state_fingerprint

ROOT = root_key(b"model", b"tenant")
SETTINGS = PlanSettings(block_tokens=8, segment_tokens=16, min_snapshot_distance=10, sparse_snapshot_tokens=32)
PROMPTS = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=120), st.sets(st.integers(-1, 130), max_size=6))


@given(PROMPTS)
def test_segments_cover_the_prompt_and_end_at_snapshots_and_on_the_grid(prompt):
    tokens, boundaries = prompt
    plan = plan_prefix(ROOT, tokens, boundaries, SETTINGS)
    assert plan.cuts[-1] == plan.num_tokens == len(tokens)
    assert list(plan.cuts) == sorted(set(plan.cuts))
    assert {*plan.snapshot_keys, *range(16, len(tokens), 16)} <= set(plan.cuts)
    position, seen = 0, []
    while position < len(tokens):
        position = plan.next_cut(position)
        seen.append(position)
    assert tuple(seen) == plan.cuts


@given(PROMPTS)
def test_snapshots_stand_apart_except_the_last_boundary(prompt):
    tokens, boundaries = prompt
    chosen = choose_snapshots(len(tokens), boundaries, SETTINGS)
    inside = [position for position in boundaries if 0 < position <= len(tokens)]
    spaced = [position for position in chosen if not inside or position != max(inside)]
    assert all(b - a >= 10 for a, b in zip([0, *spaced], spaced, strict=False))
    assert all(position in boundaries or position % 32 == 0 for position in chosen)
    assert not inside or max(inside) in chosen
    assert all(any(end - 32 < chosen_end <= end for chosen_end in chosen) for end in range(32, len(tokens), 32))


@given(PROMPTS, PROMPTS)
def test_equal_keys_mean_equal_tokens_computed_in_equal_segments(one, other):
    """Including the segment that a block ends in: it decides the last bits of the block's KV."""
    plans = [plan_prefix(ROOT, tokens, boundaries, SETTINGS) for tokens, boundaries in (one, other)]
    by_key: dict[str, set] = {}
    for plan, (tokens, _) in zip(plans, (one, other), strict=True):
        for i, key in enumerate(plan.block_keys):
            segments = segments_until(plan.cuts, (i + 1) * 8)
            by_key.setdefault(key, set()).add((tuple(tokens[: segments[-1]]), segments))
        for end, key in plan.snapshot_keys.items():
            by_key.setdefault(key, set()).add((tuple(tokens[:end]), segments_until(plan.cuts, end)))
    assert all(len(meanings) == 1 for meanings in by_key.values())


@given(PROMPTS, PROMPTS)
def test_with_int8_snapshots_equal_keys_mean_rounded_at_the_same_places(one, other):
    settings = replace(SETTINGS, int8_snapshots=True)
    plans = [plan_prefix(ROOT, tokens, boundaries, settings) for tokens, boundaries in (one, other)]
    by_key: dict[str, set] = {}
    for plan, (tokens, _) in zip(plans, (one, other), strict=True):
        ends = [((i + 1) * 8, key) for i, key in enumerate(plan.block_keys)] + list(plan.snapshot_keys.items())
        for end, key in ends:
            rounded = tuple(position for position in plan.snapshot_keys if position < end)
            by_key.setdefault(key, set()).add((tuple(tokens[:end]), segments_until(plan.cuts, end), rounded))
    assert all(len(meanings) == 1 for meanings in by_key.values())


def test_a_cut_that_is_rounded_at_in_one_prompt_only_parts_them():
    """At 16 both are cut; only where it is a boundary is a snapshot made."""
    for int8 in (False, True):
        settings = replace(SETTINGS, int8_snapshots=int8)
        one, other = (plan_prefix(ROOT, [1] * 60, boundaries, settings) for boundaries in ([16, 50], [50]))
        assert one.cuts == other.cuts
        assert one.block_keys[:2] == other.block_keys[:2]
        assert (one.block_keys[2:] == other.block_keys[2:]) is not int8


def test_a_block_is_no_other_prompts_whose_segment_goes_on_differently():
    """Experts compute a token's last bits by how many tokens of its segment they get."""
    one, other = (plan_prefix(ROOT, [1] * 26 + [last] * 30, [24, 50], SETTINGS) for last in (1, 2))
    assert one.cuts == other.cuts == (16, 24, 32, 48, 50, 56)
    assert [a == b for a, b in zip(one.block_keys, other.block_keys, strict=True)] == [True] * 3 + [False] * 3
    inside = [plan_prefix(ROOT, [1] * 20 + [last] * 30, [50], SETTINGS) for last in (1, 2)]
    assert {plan.cuts[:2] for plan in inside} == {(16, 32)}
    assert inside[0].block_keys[1] == inside[1].block_keys[1]  # up to 16
    one, other = (plan_prefix(ROOT, [1] * 12 + [last] * 30, [40], SETTINGS) for last in (1, 2))
    assert one.block_keys[0] != other.block_keys[0]  # 8 of the segment's 16 tokens


@pytest.mark.parametrize(("int8", "expected"), [(False, "6d7c6ff5113881c0"), (True, "b477d5262195bb57")])
def test_keys_are_those_of_earlier_versions(int8, expected):
    """Else the states that a store has would not be found after an update. Twice: the second time they are known."""
    for _ in range(2):
        rng, digest = random.Random(5), hashlib.blake2b(digest_size=8)
        for length in (1, 15, 16, 61, 200):
            tokens, boundaries = rng.choices(range(70_000), k=length), rng.choices(range(length + 1), k=4)
            plan = plan_prefix(ROOT, tokens, boundaries, replace(SETTINGS, int8_snapshots=int8))
            digest.update(repr((plan.cuts, plan.block_keys, plan.snapshot_keys)).encode())
            plan.snapshot_keys.clear()  # a plan's own
        assert digest.hexdigest() == expected


def segments_until(cuts: tuple[int, ...], end: int) -> tuple[int, ...]:
    return tuple(cut for i, cut in enumerate(cuts) if i == 0 or cuts[i - 1] < end)


def test_prompts_that_begin_alike_share_keys_up_to_where_they_part():
    tokens = random.Random(0).choices(range(100), k=150)
    settings = replace(SETTINGS, min_snapshot_distance=0)
    short = plan_prefix(ROOT, tokens[:100], [20, 45, 90], settings)
    long = plan_prefix(ROOT, [*tokens[:90], *tokens[100:]], [20, 45, 90, 120], settings)
    assert {20, 45, 90} <= {end for end, key in short.snapshot_keys.items() if long.snapshot_keys[end] == key}
    assert short.block_keys[:11] == long.block_keys[:11]  # 88 of the 90 tokens


def test_keys_separate_models_tenants_tokens_and_cuts():
    tokens = list(range(40))
    plans = [
        plan_prefix(ROOT, tokens, [30], SETTINGS),
        plan_prefix(root_key(b"model", b"other tenant"), tokens, [30], SETTINGS),
        plan_prefix(root_key(b"modelt", b"enant"), tokens, [30], SETTINGS),
        plan_prefix(ROOT, [1, *tokens[1:]], [30], SETTINGS),
        plan_prefix(ROOT, tokens, [12, 30], SETTINGS),
        plan_prefix(ROOT, tokens, [30], replace(SETTINGS, segment_tokens=32)),
    ]
    assert len({plan.snapshot_keys[30] for plan in plans}) == len(plans)


def test_a_state_is_tagged_with_the_documents_it_has_seen():
    plan = plan_prefix(ROOT, range(50), [10, 30], SETTINGS, tags={"a": 10, "b": 30, "c": 0})
    assert plan.tags_before(10) == {"c"}
    assert plan.tags_before(11) == {"a", "c"}
    assert plan.tags_before(31) == {"a", "b", "c"}


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no multiple of segment_tokens 512"):
        PlanSettings(segment_tokens=512, sparse_snapshot_tokens=1000)
    with pytest.raises(ValueError, match="at least 1 token"):
        PlanSettings(block_tokens=0)


def test_fingerprint_follows_weights_quantization_and_layout(tmp_path):
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(bytes(1000))
    config.write_text("{}")
    seen = [state_fingerprint(tmp_path, None, b"layout")]
    seen.append(state_fingerprint(tmp_path, "int8", b"layout"))
    seen.append(state_fingerprint(tmp_path, None, str(torch.bfloat16).encode()))
    weights.write_bytes(bytes(999) + b"\x01")
    seen.append(state_fingerprint(tmp_path, None, b"layout"))
    config.write_text('{"a": 1}')
    seen.append(state_fingerprint(tmp_path, None, b"layout"))
    assert len(set(seen)) == len(seen)
    assert state_fingerprint(tmp_path, None, b"layout") == seen[-1]


def test_far_into_a_prompt_snapshots_stand_a_sixteenth_of_the_way_apart():
    ends, settings = range(1000, 260_001, 1000), PlanSettings(min_snapshot_distance=2000, sparse_snapshot_tokens=0)
    chosen = choose_snapshots(260_000, ends, settings)
    assert chosen[:16] == list(range(2000, 32_001, 2000)) and chosen[-1] == 260_000
    for last, position in pairwise(chosen[16:-1]):
        assert last / 16 <= position - last <= last / 16 + 1000
