"""Model shapes for benchmarks with random weights: config.json fields, and their compute and memory costs.

`jamba-52b` is the published v0.1; `mixtral-8x7b` the same network with attention only, for the comparison in the Jamba
paper, table 1 (without RoPE, whose cost is negligible); `small-test` runs in seconds on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from model.config import JambaConfig
from model.jamba import Jamba
from model.state import StateLayout

_COMMON = {
    **{"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_experts_per_tok": 2},
}
_LARGE = {
    **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "mamba_expand": 2, "mamba_dt_rank": 256},
}
_SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 512, "num_experts": 4, "mamba_expand": 2, "mamba_dt_rank": 4},
}
_HYBRID = {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
_ATTENTION = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0}
_FIELDS: Mapping[str, Mapping[str, object]] = {
    "jamba-52b": _COMMON | _LARGE | _HYBRID | {"vocab_size": 65_536, "num_experts": 16},
    "mixtral-8x7b": _COMMON | _LARGE | _ATTENTION | {"vocab_size": 32_000, "num_experts": 8},
    "jamba-small": {
        **(_COMMON | _HYBRID | {"vocab_size": 16_384, "hidden_size": 576, "intermediate_size": 1536}),
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "num_experts": 2},
        **{"num_experts_per_tok": 1, "mamba_expand": 1, "mamba_dt_rank": 36, "tie_word_embeddings": True},
    },
    "small-test": _COMMON | _SMALL | _HYBRID | {"num_hidden_layers": 8},
    "small-attention": _COMMON | _SMALL | _ATTENTION | {"num_hidden_layers": 8},
}
SHAPES: Mapping[str, JambaConfig] = {name: JambaConfig.from_dict(dict(raw)) for name, raw in _FIELDS.items()}


def resident_bytes(model: Jamba) -> int:
    """Bytes of the weights, each counted once."""
    return sum(weight.nbytes for weight in model.parameters())


def state_bytes(layout: StateLayout, num_tokens: int) -> int:
    """Bytes of one sequence's state: KV of `num_tokens`, conv and SSM."""
    kv = math.prod(layout.kv_shape(num_tokens)) * layout.kv_dtype.itemsize
    recurrent = math.prod(layout.conv_shape) * layout.conv_dtype.itemsize + 4 * math.prod(layout.ssm_shape)
    return kv + recurrent


def prefill_flop(config: JambaConfig, past: int, num_tokens: int) -> float:
    """FLOPs of matrix products for `num_tokens` after `past`; the head only for the last token."""
    pairs = num_tokens * (past + (num_tokens + 1) / 2)  # pairs of queries and visible keys
    attention = 4 * config.hidden_size * pairs * config.num_attention_layers
    return 2 * _active_weights(config) * num_tokens + attention + 2 * config.vocab_size * config.hidden_size


def decode_bytes(model: Jamba, past: int, batch: int, unread: int = 0) -> float:
    """Bytes one step must move: weights once, of the experts as many as `batch` tokens choose on average, KV, states
    read and written. A batch's contexts are counted each, less `unread` tokens that another's copy is read for."""
    config, layout = model.config, model.state_layout
    untouched = (1 - config.num_experts_per_tok / config.num_experts) ** batch
    weights = 0.0
    for name, weight in model.named_parameters():
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            continue
        weights += weight.nbytes * (1 - untouched if ".experts." in name else 1)
    recurrent = state_bytes(layout, 0)
    saved = state_bytes(layout, unread) - recurrent
    return weights + batch * (state_bytes(layout, past) + recurrent) - saved


def _active_weights(config: JambaConfig) -> float:
    """Matrix weights of the layers that are active for one token."""
    with torch.device("meta"):
        model = Jamba(config)
    share = config.num_experts_per_tok / config.num_experts
    return sum(
        weight.numel() * (share if ".experts." in name else 1)
        for name, weight in model.layers.named_parameters()
        if weight.ndim > 1 and not name.endswith(("A_log", "conv1d.weight"))
    )
