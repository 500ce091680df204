"""Decoding by the GPU's own kernels against the modules: on the emulator and, where there is one, as CUDA graphs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Jamba, load_model
from model.gpu_decode import MAX_BATCH, fits
from model.state import HybridState
from tests.conftest import WriteJamba
from tests.numeric import assert_close, state_bytes

RATIO = 1.2e-2  # bfloat16 activations through four layers, against float32; the modules in bfloat16 need 1e-2
NEAR_TIE = 0.25  # between two logits of the shipped model; they spread by 3.5 and move by 0.05 in bfloat16
SMALL = {"hidden_size": 256, "intermediate_size": 96, "vocab_size": 120, "mamba_expand": 1, "num_hidden_layers": 4}
KINDS = {
    "experts": {},
    "dense": {"num_experts": 1, "num_experts_per_tok": 1},
    "one KV head": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"mamba_proj_bias": True, "num_key_value_heads": 4},
}


@pytest.fixture
def make(tmp_path: Path, write_jamba: WriteJamba, device: str):
    """make(**config fields): a random int8 model in bfloat16."""

    def build(quantize: str | None = "int8", **overrides: object) -> Jamba:
        write_jamba(tmp_path, **SMALL | overrides)
        return load_model(tmp_path, device, torch.bfloat16, quantize)

    return build


def reference(model: Jamba) -> Jamba:
    """The same weights, computed by the modules in float32."""
    return copy.deepcopy(model).cpu().float()


def tokens(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(1, SMALL["vocab_size"], (b, t), generator=torch.Generator().manual_seed(seed))


def prefilled(model: Jamba, lengths: list[int]) -> list[HybridState]:
    """States of prompts of these lengths, 0 for none; the same for any model of these weights, but for rounding."""
    states = [model.new_state() for _ in lengths]
    for i, (state, length) in enumerate(zip(states, lengths, strict=True)):
        if length:
            model.forward(tokens(1, length, seed=i).to(state.conv.device), state)
    return states


def same_states(model: Jamba, states: list[HybridState]) -> list[HybridState]:
    """Copies of the states for a model of another dtype or device."""
    copies = [model.new_state() for _ in states]
    for state, own in zip(states, copies, strict=True):
        own.reserve(state.num_tokens)
        own.num_tokens = state.num_tokens
        for to, of in ((own.conv, state.conv), (own.ssm, state.ssm)):
            to.copy_(of)
        own._kv[:, :, : state.num_tokens] = state._kv[:, :, : state.num_tokens]
    return copies


def assert_decodes(model: Jamba, lengths: list[int], steps: int) -> None:
    """Every step's logits and the states at the end as the modules have them in float32."""
    exact, b = reference(model), len(lengths)
    states = prefilled(model, lengths)
    exact_states = same_states(exact, states)
    device = model.embed_tokens.weight.device
    for token_ids in tokens(b, steps, seed=9).unbind(1):
        logits = model.forward_packed(token_ids.to(device), [1] * b, states)
        expected = exact.forward_packed(token_ids, [1] * b, exact_states)
        assert logits.dtype == torch.float32
        assert_close("logits", logits.cpu(), expected, RATIO)
    for state, expected in zip(states, exact_states, strict=True):
        assert state.num_tokens == expected.num_tokens
        assert_close("conv", state.conv.cpu(), expected.conv, RATIO)
        assert_close("ssm", state.ssm.cpu(), expected.ssm, RATIO)
        num_tokens = state.num_tokens
        assert_close("KV", state.read_kv(0, num_tokens).cpu(), expected.read_kv(0, num_tokens), RATIO)


@pytest.mark.parametrize("lengths", [[5], [70, 0, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_modules(make, kind: str, lengths: list[int]) -> None:
    model = make(**KINDS[kind])
    assert fits(model)
    assert_decodes(model, lengths, 4)


def test_the_largest_batch(make) -> None:
    model = make()
    exact, states = reference(model), prefilled(model, [2] * MAX_BATCH)
    exact_states, token_ids = same_states(exact, states), tokens(MAX_BATCH, 1, seed=9).flatten()
    logits = model.forward_packed(token_ids.to(states[0].conv.device), [1] * MAX_BATCH, states).cpu()
    expected = exact.forward_packed(token_ids, [1] * MAX_BATCH, exact_states)
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert (errors > 2 * RATIO).sum() <= 2  # a sequence whose second and third expert are as good as equal may differ


def test_batches_of_changing_size(make) -> None:
    model = make()
    exact, states = reference(model), prefilled(model, [3, 4, 5])
    exact_states = same_states(exact, states)
    device = model.embed_tokens.weight.device
    for step, members in enumerate([(0, 1, 2), (1,), (0, 1, 2), (2, 0), (2, 0), (1,), (2, 1, 0)]):
        token_ids = tokens(len(members), 1, seed=step).flatten()
        with torch.inference_mode(step % 2 == 0):
            ours = model.forward_packed(token_ids.to(device), [1] * len(members), [states[i] for i in members])
        expected = exact.forward_packed(token_ids, [1] * len(members), [exact_states[i] for i in members])
        assert_close("logits", ours.cpu(), expected, RATIO)


def test_decoding_goes_on_with_the_same_bits_from_a_kept_state(make) -> None:
    model = make()
    (state,) = prefilled(model, [255])

    def step(state: HybridState, i: int) -> Tensor:
        return model.forward_packed(tokens(1, 3)[0, i : i + 1], [1], [state])

    step(state, 0)
    other = model.new_state()
    other.restore(state.snapshot(), [state.read_kv(0, 100), state.read_kv(100, 256)])
    for i in (1, 2):  # beyond the first 256 tokens: the KV moves
        assert torch.equal(step(state, i), step(other, i))
    assert state_bytes(state) == state_bytes(other)


def test_token_ids_may_be_on_the_cpu_and_logits_are_the_callers(make) -> None:
    model = make()
    (state,) = prefilled(model, [3])
    (other,) = same_states(model, [state])
    first = model.forward_packed(torch.tensor([5]), [1], [state])
    kept = first.clone()
    model.forward_packed(torch.tensor([6]), [1], [state])
    assert torch.equal(first, kept)
    ids = torch.tensor([5], device=model.embed_tokens.weight.device)
    assert torch.equal(model.forward_packed(ids, [1], [other]), first)


@pytest.mark.parametrize(
    ("quantize", "overrides"),
    [(None, {}), ("int8", {"hidden_size": 128}), ("int8", {"mamba_d_state": 6}), ("int8", {"intermediate_size": 40})],
)
def test_models_that_do_not_fit_run_as_modules(make, quantize: str | None, overrides: dict) -> None:
    model = make(quantize, **overrides)
    assert not fits(model)
    (state,) = prefilled(model, [3])
    logits = model.forward_packed(tokens(1, 1)[0].to(state.conv.device), [1], [state])
    assert logits.dtype == torch.bfloat16


def test_models_with_positions_or_other_dtypes_do_not_fit(make) -> None:
    model = make()
    model.config = dataclasses.replace(model.config, rope_theta=1e4)
    assert not fits(model)
    assert not fits(make().bfloat16())  # A and D too
    assert not fits(make().float())


def test_large_batches_and_router_statistics_are_the_modules_affair(make) -> None:
    model = make()
    with torch.no_grad():
        assert model.gpu_decoder(MAX_BATCH) is not None
        assert model.gpu_decoder(MAX_BATCH + 1) is None
    model.collect_router_stats = True
    (state,) = prefilled(model, [3])
    model.forward_packed(tokens(1, 1)[0].to(state.conv.device), [1], [state])
    assert model.expert_utilisation().shape[1] == model.config.num_experts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shipped_checkpoint_writes_what_it_writes_on_the_cpu() -> None:
    from bench.hf_parity import SHIPPED, sample_prompts  # which reads documents

    on_gpu, on_cpu = load_model(SHIPPED, "cuda", quantize="int8"), load_model(SHIPPED, quantize="int8")
    assert fits(on_gpu)
    prompt = torch.tensor(sample_prompts(1))
    state, cpu_state = on_gpu.new_state(), on_cpu.new_state()
    logits = on_gpu.forward(prompt.cuda(), state, logits="last").float().cpu()
    expected = on_cpu.forward(prompt, cpu_state, logits="last")
    for _ in range(50):
        ours, token = logits.argmax(), expected.argmax()
        assert expected[0, token] - expected[0, ours] < NEAR_TIE
        logits = on_gpu.forward_packed(token[None], [1], [state]).cpu()
        expected = on_cpu.forward_packed(token[None], [1], [cpu_state])
