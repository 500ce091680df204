"""BERT without `transformers`, whose import takes longer than all else between a start and the first vector.

Start at `load_bert`. Source: Devlin et al., "BERT" (2018); names as in checkpoints of Hugging Face.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}
_UNUSED = ("pooler.", "embeddings.position_ids")  # of the stored weights: a head for another task, and 0, 1, 2 …
_TABLES = ("word", "token_type", "position")
_LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_LAYER += ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")


class Bert:
    """An encoder: token ids in, a state of each token out. `weights` by their names in a checkpoint."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Raises ValueError when `weights` are not those of `config`."""
        self.weights = weights
        self._layers = [f"encoder.layer.{number}" for number in range(config["num_hidden_layers"])]
        self._heads = config["num_attention_heads"]
        self._eps = config.get("layer_norm_eps", 1e-12)
        self._activation = ACTIVATIONS[config.get("hidden_act", "gelu")]
        linear = ["embeddings.LayerNorm", *(f"{layer}.{part}" for layer in self._layers for part in _LAYER)]
        expected = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
        expected |= {f"embeddings.{table}_embeddings.weight" for table in _TABLES}
        if wrong := sorted(expected ^ weights.keys()):
            raise ValueError(f"{len(wrong)} weights are missing or unknown, such as {wrong[0]}")

    def __call__(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        """(rows, tokens) ids, 1 for a token and 0 for padding, and which text a token is of -> (rows, tokens, dim)."""
        words, types, positions = (self.weights[f"embeddings.{table}_embeddings.weight"] for table in _TABLES)
        x = F.embedding(ids, words) + (types[0] if kinds is None else F.embedding(kinds, types))
        x = self._norm(x + positions[: ids.shape[1]], "embeddings.LayerNorm")
        seen = None if bool(mask.all()) else mask[:, None, None].bool()
        for layer in self._layers:
            x = self._norm(x + self._attend(x, seen, f"{layer}.attention"), f"{layer}.attention.output.LayerNorm")
            inner = self._activation(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x

    def _attend(self, x: Tensor, seen: Tensor | None, name: str) -> Tensor:
        """`seen`: (rows, 1, 1, tokens), or None when none is padding."""
        q, k, v = (
            self._linear(x, f"{name}.self.{part}").unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        found = F.scaled_dot_product_attention(q, k, v, seen)
        return self._linear(found.transpose(1, 2).flatten(2), f"{name}.output.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self._eps)


def load_bert(model_dir: Path, updates: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Bert:
    """The BERT of config.json and model.safetensors with the low-rank updates added, as `add_low_rank` takes them.

    Raises ValueError when the two do not fit each other.
    """
    config = json.loads((model_dir / "config.json").read_bytes())
    weights = load_file(model_dir / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    add_low_rank(kept, updates)
    return Bert(config, {name: tensor.to(device, dtype) for name, tensor in kept.items()})


def add_low_rank(weights: dict[str, Tensor], updates: dict[str, Tensor]) -> None:
    """Add B·A to every weight NAME for which there are NAME.A (rank, in) and NAME.B (out, rank), in place."""
    for name in sorted(key.removesuffix(".A") for key in updates if key.endswith(".A")):
        weights[name] = weights[name] + updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
