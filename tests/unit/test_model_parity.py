"""First rung: our logits are those of `transformers`, over the configuration space.

Its Jamba is a reference for one full prefill and for single-token steps only: a call with several tokens on a filled
cache restarts the SSM there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from model import load_model
from tests.conftest import WriteJamba
from tests.numeric import assert_close

RATIO = 1e-5


@st.composite
def jamba_configs(draw: st.DrawFn) -> dict[str, object]:
    """Any published kind of Jamba, made small."""
    kv_heads, per_group, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4])), 8
    attn_period, expert_period = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_experts = draw(st.sampled_from([1, 2, 4, 5]))
    return {
        "vocab_size": 67,
        "hidden_size": kv_heads * per_group * head_dim,
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": kv_heads * per_group,
        "num_key_value_heads": kv_heads,
        "attn_layer_period": attn_period,
        "attn_layer_offset": draw(st.integers(0, attn_period - 1)),
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, num_experts))),
        "expert_layer_period": expert_period,
        "expert_layer_offset": draw(st.integers(0, expert_period - 1)),
        "mamba_d_state": draw(st.sampled_from([1, 5, 16])),
        "mamba_d_conv": draw(st.sampled_from([2, 3, 4])),
        "mamba_expand": draw(st.sampled_from([1, 2])),
        "mamba_dt_rank": draw(st.sampled_from(["auto", 3])),
        "mamba_conv_bias": draw(st.booleans()),
        "mamba_proj_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    config=jamba_configs(), fused=st.booleans(), num_tokens=st.integers(2, 45), num_prefill=st.integers(1, 44),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_logits_equal_those_of_transformers(
    write_jamba: WriteJamba, config: dict[str, object], fused: bool, num_tokens: int, num_prefill: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        theirs = write_jamba(Path(directory), seed, {"save_original_format": not fused}, **config)
        ours = load_model(directory)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 67, (2, num_tokens), generator=generator)
    with torch.no_grad():
        whole = theirs(tokens, use_cache=False).logits
        assert_close("without a state", ours(tokens), whole, RATIO)

    num_prefill = min(num_prefill, num_tokens - 1)
    parts = (tokens[:, :num_prefill], *tokens[:, num_prefill:].split(1, dim=1))
    states = [ours.new_state(), ours.new_state()]
    stepwise = torch.cat([ours(part, states) for part in parts], dim=1)
    assert_close("prefill and steps", stepwise, whole, RATIO)
    if "attention" in theirs.config.layers_block_type:  # without any, their cache cannot tell how long it is
        cache = DynamicCache(config=theirs.config)
        with torch.no_grad():
            expected = [theirs(part, past_key_values=cache, use_cache=True).logits for part in parts]
        assert_close("prefill and steps of both", stepwise, torch.cat(expected, dim=1), RATIO)


def test_the_model_can_be_trained_from_hf_weights(
    tiny_jamba_dir: Path, write_jamba: WriteJamba, tmp_path: Path
) -> None:
    ours, theirs = load_model(tiny_jamba_dir), write_jamba(tmp_path)
    tokens = torch.randint(0, 512, (2, 37), generator=torch.Generator().manual_seed(0))
    for logits in (ours(tokens), theirs(tokens, use_cache=False).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, expected[name], ratio=1e-4)


def test_bfloat16_stays_near_float32(write_jamba: WriteJamba, tmp_path: Path) -> None:
    write_jamba(tmp_path, num_experts=1)  # with experts a rounding may send a token elsewhere
    tokens = torch.randint(0, 512, (1, 37), generator=torch.Generator().manual_seed(0))
    full, low = load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_close("without a state", low(tokens), full(tokens), ratio=3e-2)
    state = low.new_state()
    stepwise = torch.cat([low(part, state) for part in (tokens[:, :20], *tokens[:, 20:].split(1, dim=1))], dim=1)
    assert_close("prefill and steps", stepwise, full(tokens, full.new_state()), ratio=3e-2)
    assert state.ssm.dtype == torch.float32 and state.conv.dtype == low(tokens, state).dtype == torch.bfloat16
