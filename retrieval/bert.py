"""BERT's encoder, for embedder and reranker: token ids to the hidden states of the last layer. Start at `load_bert`.

Reads checkpoints as `transformers` does and gives the same bits; not its pooler, heads or training. Importing BERT from
there takes 3 s of CPU, half of it PyTorch's compiler: the first question after a start waited for that.
Source: Devlin, Chang, Lee, Toutanova 2019; transformers, models/bert/modeling_bert.py.
"""

import json
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_UNUSED = ("pooler.", "embeddings.position_ids")  # of the stored weights: a head for another task, and 0, 1, 2 …


class UnsupportedBert(RuntimeError):
    """The config.json is of no BERT that can be computed here."""


@dataclass(frozen=True, slots=True)
class BertConfig:
    """What the weights are: config.json, field for field; what BERT's first files lack has the paper's value."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    is_decoder: bool = False

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Raises UnsupportedBert."""
        raw = json.loads(path.read_bytes())
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in needed if name not in raw]:
            raise UnsupportedBert(f"{path} lacks {', '.join(missing)}: not the config.json of a BERT")
        config = cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})
        if config.hidden_act not in _ACTIVATIONS:
            raise UnsupportedBert(f"{path}: hidden_act is {config.hidden_act!r}, not one of {', '.join(_ACTIVATIONS)}")
        if config.is_decoder:
            raise UnsupportedBert(f"{path}: a decoder; what can be used is an encoder, which reads in both directions")
        return config


class Bert(nn.Module):
    """Modules are named as in checkpoints. Built on the meta device: `load_state_dict` with `assign` fills it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        with torch.device("meta"):  # no random weights first: that takes time and other threads' random numbers
            self.embeddings = nn.ModuleDict(
                {
                    "word_embeddings": _embedding(config.vocab_size, d),
                    "position_embeddings": _embedding(config.max_position_embeddings, d),
                    "token_type_embeddings": _embedding(config.type_vocab_size, d),
                    "LayerNorm": nn.LayerNorm(d, config.layer_norm_eps),
                }
            )
            layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
            self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        """ids (b, t), mask (b, t) 1 = a token and 0 = padding, kinds (b, t), None = all 0 -> (b, t, d)."""
        part = self.embeddings
        kinds = torch.zeros_like(ids) if kinds is None else kinds
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = part["word_embeddings"](ids) + part["token_type_embeddings"](kinds) + part["position_embeddings"](positions)
        x = part["LayerNorm"](x)
        seen = None if mask.all() else mask[:, None, None, :].bool()
        for layer in self.encoder["layer"]:
            x = layer(x, seen)
        return x


def _embedding(number: int, d: int) -> nn.Embedding:
    """Its usual random start would, on the meta device, import torch._dynamo, which takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(number, d))


class _AddNorm(nn.Module):
    def __init__(self, d_in: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(d_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")})
        self.output = _AddNorm(d, config)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (self.self[name](x).view(b, t, self.heads, -1).transpose(1, 2) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (b, h, t, p)
        return self.output(y.transpose(1, 2).reshape(b, t, d), x)


class _Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = _AddNorm(config.intermediate_size, config)
        self.activate = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = self.attention(x, seen)
        return self.output(self.activate(self.intermediate["dense"](x)), x)


def load_bert(model_dir: Path, updates: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Bert:
    """The BERT of config.json and model.safetensors with the low-rank updates added, as `add_low_rank` takes them.

    Raises UnsupportedBert.
    """
    model = Bert(BertConfig.from_json(model_dir / "config.json"))
    weights = load_file(model_dir / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    add_low_rank(kept, updates)
    model.load_state_dict(kept, strict=True, assign=True)
    return model.eval().requires_grad_(False).to(device, dtype)


def add_low_rank(weights: dict[str, Tensor], updates: dict[str, Tensor]) -> None:
    """Add B·A to every weight NAME for which there are NAME.A (rank, in) and NAME.B (out, rank), in place."""
    for name in sorted(key.removesuffix(".A") for key in updates if key.endswith(".A")):
        weights[name] = weights[name] + updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
