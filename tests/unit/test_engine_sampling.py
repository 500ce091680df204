import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import SamplingParams, StopMatcher, choose_token

LOGPROBS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


def draw(params: SamplingParams, times: int = 4000, allowed=None, logprobs=LOGPROBS) -> dict[int, float]:
    rng = random.Random(params.seed)
    counts = Counter(choose_token(logprobs, params, rng, allowed) for _ in range(times))
    return {token_id: count / times for token_id, count in counts.items()}


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first():
    assert draw(SamplingParams(), times=3) == {0: 1.0}
    assert draw(SamplingParams(), times=3, allowed=[4, 3, 2]) == {2: 1.0}
    assert draw(SamplingParams(), times=3, logprobs=torch.zeros(4)) == {0: 1.0}


def test_sampling_follows_the_probabilities():
    shares = draw(SamplingParams(temperature=1.0, seed=1))
    assert all(abs(shares[i] - float(p)) < 0.03 for i, p in enumerate(LOGPROBS.exp()))
    cold = draw(SamplingParams(temperature=0.5, seed=1))
    expected = LOGPROBS.exp() ** 2 / (LOGPROBS.exp() ** 2).sum()
    assert all(abs(cold.get(i, 0) - float(p)) < 0.03 for i, p in enumerate(expected))


def test_a_temperature_near_zero_takes_the_likeliest():
    for temperature in (1e-40, 1e-300, 5e-324):
        assert draw(SamplingParams(temperature=temperature, seed=1), times=3) == {0: 1.0}
        assert draw(SamplingParams(temperature=temperature, seed=1), times=3, allowed=[4, 3, 2]) == {2: 1.0}


def test_top_p_keeps_the_smallest_nucleus_that_reaches_it():
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.5, seed=1))) == {0}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.6, seed=1))) == {0, 1}
    assert set(draw(SamplingParams(temperature=1.0, top_p=1e-9, seed=1))) == {0}


def test_the_constraint_is_renormalised():
    shares = draw(SamplingParams(temperature=1.0, seed=1), allowed=[4, 1, 4])
    assert set(shares) == {1, 4}
    assert abs(shares[1] - 0.8) < 0.03


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(deadline=None, derandomize=True)
def test_rounding_of_the_logits_does_not_change_the_token(seed, weights_seed):
    """A batch gives logits that differ in the last bits; near-equal logits may then change their order."""
    generator = torch.Generator().manual_seed(weights_seed)
    logprobs = torch.randn(50, generator=generator).round(decimals=1).log_softmax(-1)
    noisy = logprobs * (1 + 1e-7 * torch.randn(50, generator=generator))
    params = SamplingParams(temperature=0.9)
    assert choose_token(logprobs, params, random.Random(seed)) == choose_token(noisy, params, random.Random(seed))


def test_nothing_allowed_and_broken_logits_are_errors():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="allows no next token"):
        choose_token(LOGPROBS, SamplingParams(), rng, allowed=[])
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            choose_token(torch.tensor([0.0, broken]), SamplingParams(), rng)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ("",)}, "stop string"),
    ],
)
def test_params_out_of_range_name_the_field(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


@given(st.lists(st.text(alphabet="abc"), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_stop_matcher_gives_the_text_before_the_first_stop_string(pieces, stop):
    matcher, given_out, stopped, pushed = StopMatcher(stop), "", False, ""
    for piece in pieces:
        pushed += piece
        certain, stopped = matcher.push(piece)
        given_out += certain
        if stopped:
            break
        assert not any(stop_string in given_out for stop_string in stop)
    met = [pushed.find(stop_string) for stop_string in stop if stop_string in pushed]
    assert stopped == bool(met)
    assert (given_out if stopped else given_out + matcher.finish()) == (pushed[: min(met)] if met else pushed)


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["\n\n", "END"])
    assert [matcher.push(piece)[0] for piece in ("a\n", "b", "E", "N", "x")] == ["a", "\nb", "", "", "ENx"]
    assert matcher.push("!END?") == ("!", True)
