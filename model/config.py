"""What the weights are: the fields of config.json that decide the network, under their published names.

Not here: how a deployment runs them (app/settings.py), or what a request wants (SamplingParams).
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self


class UnsupportedWeights(ValueError):
    """A checkpoint that is not the Jamba it says it is; the message names every field or tensor at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JambaConfig:
    """config.json, field for field. Raises UnsupportedWeights when the fields contradict each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    attn_layer_period: int
    attn_layer_offset: int
    num_experts: int
    num_experts_per_tok: int
    expert_layer_period: int
    expert_layer_offset: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_expand: int
    mamba_dt_rank: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float | None = None  # published Jamba has no positions; other members of the family may

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read config.json; raises UnsupportedWeights naming all missing or unsupported fields at once."""
        return cls.from_dict(json.loads(path.read_text()), source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config") -> Self:
        """Fields that do not change the network (cache flags, token ids, training coefficients) are ignored."""
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in raw]
        if missing:
            raise UnsupportedWeights(f"{source} lacks {', '.join(missing)}: not a Jamba config.json")
        if problems := _unsupported_values(raw):
            raise UnsupportedWeights(f"{source}: {'; '.join(problems)}")
        values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        if values["mamba_dt_rank"] == "auto":
            values["mamba_dt_rank"] = math.ceil(raw["hidden_size"] / 16)
        return cls(**values)

    def __post_init__(self) -> None:
        if problems := self._contradictions():
            raise UnsupportedWeights(f"Jamba config: {'; '.join(problems)}")

    def to_dict(self) -> dict[str, Any]:
        """config.json as `transformers` reads it."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return {"architectures": ["JambaForCausalLM"], "model_type": "jamba", "hidden_act": "silu"} | own

    def is_attention(self, layer: int) -> bool:
        return layer % self.attn_layer_period == self.attn_layer_offset

    def is_moe(self, layer: int) -> bool:
        return self.num_experts > 1 and layer % self.expert_layer_period == self.expert_layer_offset

    @property
    def num_attention_layers(self) -> int:
        return sum(map(self.is_attention, range(self.num_hidden_layers)))

    @property
    def num_mamba_layers(self) -> int:
        return self.num_hidden_layers - self.num_attention_layers

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mamba_d_inner(self) -> int:
        return self.mamba_expand * self.hidden_size

    def _contradictions(self) -> list[str]:
        may_be_zero = {"attn_layer_offset", "expert_layer_offset", "mamba_conv_bias", "mamba_proj_bias"}
        problems = [
            f"{f.name} is {value!r}, must be positive"
            for f in fields(self)
            if f.name not in may_be_zero | {"tie_word_embeddings", "rope_theta"}
            if not (isinstance(value := getattr(self, f.name), int | float) and value > 0)
        ]
        if problems:
            return problems
        for small, large in (
            ("attn_layer_offset", "attn_layer_period"),
            ("expert_layer_offset", "expert_layer_period"),
        ):
            if not 0 <= getattr(self, small) < getattr(self, large):
                problems.append(f"{small} {getattr(self, small)} is not within {large} {getattr(self, large)}")
        for part, whole in (
            ("num_attention_heads", "hidden_size"),
            ("num_key_value_heads", "num_attention_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                problems.append(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")
        if self.num_experts_per_tok > self.num_experts > 1:
            problems.append(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.rope_theta is not None and self.head_dim % 2:
            problems.append(f"rope_theta needs an even head dimension, got {self.head_dim}")
        return problems


def _unsupported_values(raw: dict[str, Any]) -> list[str]:
    """Optional fields that would change the network, where they ask for what this one does not do."""
    problems = [
        f"{name} is {raw[name]!r}, only {only!r} is supported"
        for name, only in (("model_type", "jamba"), ("hidden_act", "silu"), ("mamba_inner_layernorms", True))
        if raw.get(name, only) != only
    ]
    if raw.get("sliding_window") is not None:
        problems.append(f"sliding_window is {raw['sliding_window']!r}, only full attention is supported")
    heads, head_dim = raw["num_attention_heads"], raw.get("head_dim")
    if head_dim is not None and head_dim * heads != raw["hidden_size"]:
        problems.append(f"head_dim {head_dim} times {heads} heads is not hidden_size {raw['hidden_size']}")
    return problems
