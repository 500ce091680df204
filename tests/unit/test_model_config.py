"""config.json: what is demanded, what is refused, what may be there or not."""

from __future__ import annotations

import pytest

from model import JambaConfig, UnsupportedWeights

_ANY_CONFIG = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": "auto",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def test_config_names_every_missing_field() -> None:
    raw = {name: value for name, value in _ANY_CONFIG.items() if name not in ("mamba_d_conv", "num_experts")}
    with pytest.raises(UnsupportedWeights, match=r"lacks num_experts, mamba_d_conv"):
        JambaConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"mamba_inner_layernorms": False}, "mamba_inner_layernorms is False"),
        ({"head_dim": 16}, "head_dim 16 times 1 heads is not hidden_size 8"),
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        ({"attn_layer_offset": 1}, "attn_layer_offset 1 is not within attn_layer_period 1"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 exceeds num_experts 2"),
        ({"mamba_d_state": 0, "vocab_size": -1}, "vocab_size is -1, must be positive; mamba_d_state is 0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', must be positive"),
    ],
)
def test_config_refuses_what_the_network_does_not_do(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedWeights, match=message):
        JambaConfig.from_dict(_ANY_CONFIG | fields)


def test_config_is_read_as_it_was_written() -> None:
    config = JambaConfig.from_dict(_ANY_CONFIG)
    assert config.mamba_dt_rank == 1  # 'auto': a sixteenth of hidden_size, rounded up
    assert JambaConfig.from_dict(config.to_dict()) == config
