"""A long prefill segment computed some layers at a time, so that decode steps of others can come between.

The layers are the same and see the same, whatever comes between them: so is every bit of the result.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from model.batch import Batch
from model.jamba import Jamba
from model.state import HybridState


class LayeredPrefill:
    """The forward pass of one sequence's next tokens (t,). Its state may not be used before `run` gives logits."""

    def __init__(self, model: Jamba, token_ids: Tensor, state: HybridState) -> None:
        self._model, self._layers = model, iter(model.layers)
        self._batch = Batch.of_states([len(token_ids)], [state], token_ids.device)
        self._x = model.embed_tokens(token_ids)

    def run(self, seconds: float | None = None) -> Tensor | None:
        """Compute for about `seconds`, a layer at least; None: to the end. Logits (1, v) when that is reached."""
        start = time.perf_counter()
        for layer in self._layers:
            self._x = layer(self._x, self._batch)
            if seconds is not None and self._seconds_since(start) >= seconds:
                return None
        self._batch.commit()
        return self._model.lm_head(self._model.final_layernorm(self._x[-1:]))

    def _seconds_since(self, start: float) -> float:
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        return time.perf_counter() - start
