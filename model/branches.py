"""Scores given continuations of one prompt, all in one forward pass from copies of its state."""

from __future__ import annotations

import itertools

import torch

from model.engine_request import Branches
from model.jamba import Jamba
from model.state import HybridState


def score_branches(model: Jamba, state: HybridState, branches: Branches) -> tuple[tuple[float, ...], ...]:
    """Log-probability of each of the last `scored_tokens` of each branch after `state`, which does not change.

    A branch's bits depend on the other branches, but on nothing else that the engine does. Memory for the copies is not
    reserved beforehand (on a GPU they share the KV): raises torch.OutOfMemoryError if there is none.
    """
    lengths, device = [len(ids) for ids in branches.token_ids], model.embed_tokens.weight.device
    given = torch.tensor(list(itertools.chain(*branches.token_ids)), device=device)
    states = [_copy(model, state, length) for length in lengths]
    logits = model.forward_packed(given, lengths, states, logits="all")
    told, end = [], 0
    for length, scored in zip(lengths, branches.scored_tokens, strict=True):
        end += length
        logprobs = logits[end - scored - 1 : end - 1].float().log_softmax(-1)
        told.append(logprobs.gather(1, given[end - scored : end, None]).squeeze(1))
    nats = iter(torch.cat(told).tolist())
    return tuple(tuple(itertools.islice(nats, scored)) for scored in branches.scored_tokens)


def _copy(model: Jamba, state: HybridState, room: int) -> HybridState:
    copy = model.new_state(state.lend(state.num_tokens) if model.can_borrow else None)
    copy.reserve(state.num_tokens + room)
    state.copy_to(copy)
    return copy
