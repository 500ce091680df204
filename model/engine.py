"""Continuous batching of many requests on one model: prefill in segments, batched decoding, prefix caching of states.

This is the scheduler. Not here: how tokens are chosen (sampling.py, generation.py), where prefills are cut
(prefix_plan.py), threads (engine_thread.py). Start at `JambaEngine.step`.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model import gpu_segment
from model.branches import score_branches
from model.drafting import PromptLookup, draft_all, score_pieces
from model.engine_request import (
    EngineOverloaded,
    EngineRequest,
    RequestTimings,
    StepOutput,
)
from model.engine_sequence import RunningSequence
from model.engine_times import EngineTimes
from model.generation import FinishReason, Generated, Generation, Likeliest, score
from model.gpu_warm_up import warm_up
from model.jamba import Jamba
from model.layered_prefill import LayeredPrefill
from model.prefix_cache import PrefixCache, PrefixHit
from model.prefix_plan import PrefixPlan
from model.state_room import StateRoom
from model.tokenizer import Tokenizer

_LOAD_WAIT_S = 0.05  # how long a step with nothing else to do waits for a state to load
_WHOLE_TOKENS = {"cpu": 512, "cuda": gpu_segment.LONGEST}  # longest segment that decode steps do not interrupt
_PREFILL_PER_DECODE = 2.0  # longer segments: prefill time between two decode steps, as a multiple of one decode step
_log = logging.getLogger(__name__)


class JambaEngine:
    """The engine on one device.

    A prefill segment is always computed alone, so that its bits depend only on its prompt. `max_batch` bounds the
    running requests, `max_waiting` the waiting ones, `max_context_tokens` prompt plus answer of one request,
    `state_max_bytes` (None: no limit) the memory of all states (state_room.py). A request reserves memory for its whole
    prompt and answer when it starts; if there is too little, it waits for others to end. `draft_tokens`: most tokens
    per step that are guessed and verified (speculative decoding), if the model can; the answer does not change.
    """

    def __init__(
        self,
        model: Jamba,
        tokenizer: Tokenizer,
        prefix_cache: PrefixCache | None = None,
        *,
        max_context_tokens: int,
        max_batch: int = 8,
        max_waiting: int = 256,
        state_max_bytes: int | None = None,
        draft_tokens: int = 3,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._draft_tokens, self.times = draft_tokens, EngineTimes()
        self.prefix_cache = prefix_cache or PrefixCache(())
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._room = StateRoom(model, self.prefix_cache, state_max_bytes, max_batch)
        fitting = self._room.max_tokens
        self.max_context_tokens = max_context_tokens if fitting is None else min(fitting, max_context_tokens)
        self._device = model.embed_tokens.weight.device
        self._ids = map("seq-{}".format, itertools.count(1))
        self._sequences: dict[str, RunningSequence] = {}  # waiting and running, in order of arrival
        self._aborted: set[str] = set()
        self._waiting: deque[RunningSequence] = deque()
        self._loading: dict[RunningSequence, Future[tuple[PrefixHit | None, float]]] = {}
        self._prefilling: deque[RunningSequence] = deque()
        self._decoding: list[RunningSequence] = []
        self._decode_s, self._piece_s = 0.0, dict[str, float]()  # of the last batch; of LayeredPrefill's pieces
        self._preparing = itertools.chain(warm_up(model, max_batch), self.prefix_cache.prepare(model.state_layout))
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefix-load")

    def add(self, request: EngineRequest) -> str:
        with self.times.within("add"):
            return self._add(request)

    def _add(self, request: EngineRequest) -> str:
        token_ids = np.asarray(request.token_ids, dtype=np.int64)
        request.check(token_ids, self.max_context_tokens, self._model.config.vocab_size)
        if len(self._waiting) >= self._max_waiting:
            raise EngineOverloaded(f"{len(self._waiting)} requests wait already, which is the limit; try again later")
        tags = {tag: request.tag_starts.get(tag, 0) for tag in request.tags}
        plan = self.prefix_cache.plan(token_ids, request.boundaries, request.salt, tags, request.epoch)
        generation = Generation(self._tokenizer, request.sampling, request.constraint, request.watch_tokens)
        lookup = PromptLookup(token_ids, generation, self.times.drafts)
        sequence = RunningSequence(next(self._ids), request, plan, generation, lookup, time.perf_counter())
        self._sequences[sequence.request_id] = sequence
        bisect.insort(self._waiting, sequence, key=lambda one: one.request.turn)
        return sequence.request_id

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one decode batch and one prefill segment. Prefills take turns, so that a long one delays nobody.

        A segment that would take much longer than a decode step is spread over several steps.
        """
        enter = self.times.enter
        enter("start")
        outputs = self._end_aborted() + self._start_waiting()
        enter("load")
        self._collect_loaded()
        enter("decode")
        outputs += self._decode_batch()
        enter("prefill")
        outputs += self._prefill_segment()
        enter("deliver" if self._sequences else "idle")
        return outputs

    def abort(self, request_id: str) -> None:
        if request_id in self._sequences:
            self._aborted.add(request_id)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def prepare(self) -> bool:
        try:
            return next(self._preparing, "done") is None
        except Exception:
            _log.warning("preparing for later requests failed; they will do it themselves", exc_info=True)
            return False

    def close(self) -> None:
        """Forget all requests and end the loading thread. The cache stays open."""
        for group in (self._sequences, self._waiting, self._loading, self._prefilling, self._decoding):
            group.clear()
        self._room.close()
        self._loader.shutdown(cancel_futures=True)

    def _end_aborted(self) -> list[StepOutput]:
        ended = [self._sequences[request_id] for request_id in self._aborted if request_id in self._sequences]
        self._aborted.clear()
        return [self._end(sequence, "abort") for sequence in ended]

    def _start_waiting(self) -> list[StepOutput]:
        """Start waiting requests in their turn, as far as memory allows; a request whose prefix another one is
        computing right now waits for it."""
        outputs = []
        for sequence in list(self._waiting):
            under_way = [*self._loading, *self._prefilling, *self._decoding]
            if len(under_way) >= self._max_batch:
                break
            if (coming_tokens := self._coming_prefix(sequence)) is not None:
                sequence.tell(coming_tokens)
                continue
            try:
                plan, others = sequence.plan, [other.state for other in under_way]
                sequence.state = self._room.new_state(plan, sequence.max_tokens, others, sequence.may_borrow)
            except Exception as error:
                outputs.append(self._fail(sequence, error))
                continue
            if sequence.state is None:  # later requests must not overtake it, or it might wait for ever
                break
            self._waiting.remove(sequence)
            self._loading[sequence] = self._loader.submit(
                self._find_prefix, sequence.plan, sequence.counted, sequence.state.lent_tokens
            )
        return outputs

    def _coming_prefix(self, sequence: RunningSequence) -> int | None:
        """Tokens read so far by another request that will pass a snapshot this one could start from; None if none."""
        if not self.prefix_cache.keeps_states:
            return None
        wanted = sequence.plan
        for other in (*self._loading, *self._prefilling):
            ahead = other.plan.snapshot_keys.items()
            if any(
                other.position < end < wanted.num_tokens and wanted.snapshot_keys.get(end) == key for end, key in ahead
            ):
                return other.position
        return None

    def _find_prefix(self, plan: PrefixPlan, counted: bool, lent_tokens: int) -> tuple[PrefixHit | None, float]:
        """(hit, milliseconds). Runs on the loading thread, so that a slow store delays only this request."""
        start = time.perf_counter()
        try:
            hit = self.prefix_cache.longest_prefix(plan, counted, lent_tokens)
        except Exception:
            _log.exception("looking for a cached prefix failed; computing it")
            hit = None
        return hit, _ms_since(start)

    def _collect_loaded(self) -> None:
        if not (self._prefilling or self._decoding):
            wait(self._loading.values(), timeout=_LOAD_WAIT_S, return_when=FIRST_COMPLETED)
        for sequence in [sequence for sequence, future in self._loading.items() if future.done()]:
            hit, load_ms = self._loading.pop(sequence).result()
            start = time.perf_counter()
            if hit is not None:
                self._restore(sequence, hit)
            if sequence.position < sequence.state.lent_tokens:  # the prefix it was to start from was evicted meanwhile
                sequence.state, sequence.may_borrow = None, False
                bisect.insort_left(self._waiting, sequence, key=lambda one: one.request.turn)
                continue
            sequence.timings = RequestTimings(state_load_ms=load_ms + _ms_since(start))
            self._prefilling.append(sequence)
            sequence.tell(sequence.position)

    def _restore(self, sequence: RunningSequence, hit: PrefixHit) -> None:
        try:
            self.prefix_cache.restore(hit, sequence.state)
        except (ValueError, torch.OutOfMemoryError):
            _log.exception("a cached state does not fit the model or its memory; computing it")
            return
        sequence.cached_tokens = sequence.kept_tokens = hit.num_tokens
        sequence.tier = hit.tier

    def _prefill_segment(self) -> list[StepOutput]:
        """Continue the prefill whose turn it is; returns its first token if this finished its last segment."""
        if not self._prefilling:
            return []
        sequence = self._prefilling[0]
        start = time.perf_counter()
        try:
            logits = self._advance_segment(sequence)
        except Exception as error:
            return [self._fail(sequence, error)]
        if logits is None:
            sequence.timings = _add_prefill(sequence.timings, start)
            return []
        self._prefilling.popleft()
        with self.times.within("save"):
            self._keep(sequence)
        sequence.tell(sequence.position)
        if sequence.position < sequence.plan.num_tokens:  # no synchronization: a GPU may still be computing
            sequence.timings = _add_prefill(sequence.timings, start)
            self._prefilling.append(sequence)
            return []
        try:
            (scores,) = score(logits, [sequence.generation])
            sequence.timings = _add_prefill(sequence.timings, start)
            if sequence.request.branches is not None:
                sequence.branch_logprobs = score_branches(self._model, sequence.state, sequence.request.branches)
        except Exception as error:
            return [self._fail(sequence, error)]
        self._decoding.append(sequence)
        sequence.timings = replace(sequence.timings, ttft_ms=_ms_since(sequence.added_s))
        return [self._advance(sequence, scores)]

    def _advance_segment(self, sequence: RunningSequence) -> Tensor | None:
        """Logits (1, v) of the segment's last token once the segment is finished, None before."""
        if sequence.segment is None:
            begin, end = sequence.position, sequence.plan.next_cut(sequence.position)
            self.times.prefill_tokens += end - begin
            token_ids = torch.tensor(sequence.request.token_ids[begin:end], device=self._device)
            if len(token_ids) <= _WHOLE_TOKENS[self._device.type]:
                return self._model.forward_packed(token_ids, [len(token_ids)], [sequence.state])
            sequence.segment = LayeredPrefill(self._model, token_ids, sequence.state, self._piece_s)
        logits = sequence.segment.run(_PREFILL_PER_DECODE * self._decode_s if self._decoding else None)
        if logits is not None:
            sequence.segment = None
        return logits

    def _keep(self, sequence: RunningSequence) -> None:
        """Save the state if the plan has a snapshot here; a failure to save does not fail the answer."""
        try:
            if self.prefix_cache.save(sequence.plan, sequence.state, sequence.kept_tokens):
                sequence.kept_tokens = sequence.position
        except Exception:
            _log.exception("a state of %d tokens could not be kept", sequence.position)

    def _decode_batch(self) -> list[StepOutput]:
        batch = list(self._decoding)
        if not batch:
            return []
        positions, start = [sequence.position for sequence in batch], time.perf_counter()
        try:
            outputs = self._decode(batch)
            self._decode_s = time.perf_counter() - start
            self.times.decode_steps += 1
            self.times.decoded_tokens += len(outputs)
            return outputs
        except Exception as error:
            if len(batch) == 1 or positions != [sequence.position for sequence in batch]:  # never apply a token twice
                return [self._fail(sequence, error) for sequence in batch]
            _log.warning("a batch of %d failed (%s); decoding one by one", len(batch), error)
        return [output for sequence in batch for output in self._decode_alone(sequence)]

    def _decode_alone(self, sequence: RunningSequence) -> list[StepOutput]:
        """Find out which sequence made a batch fail: a batch commits its states only once all is computed."""
        try:
            return self._decode([sequence])
        except Exception as error:
            return [self._fail(sequence, error)]

    def _decode(self, batch: list[RunningSequence]) -> list[StepOutput]:
        """The next token of each sequence, and the correctly guessed tokens after it."""
        drafts = draft_all([one.lookup for one in batch], self._draft_tokens if self._model.can_try else 0)
        pieces = [[one.generation.token_ids[-1], *draft] for one, draft in zip(batch, drafts, strict=True)]
        token_ids, lengths = torch.tensor(list(itertools.chain(*pieces))), [len(piece) for piece in pieces]
        states, generations = [one.state for one in batch], [one.generation for one in batch]
        if not any(drafts):
            scores = score(self._model.forward_packed(token_ids, lengths, states), generations)
            return [self._advance(sequence, own) for sequence, own in zip(batch, scores, strict=True)]
        trial = self._model.try_tokens(token_ids, lengths, states)
        scores = score_pieces(trial.logits, generations, lengths)
        outputs = [self._advance_all(*one) for one in zip(batch, scores, drafts, strict=True)]
        trial.keep([len(own) for own in outputs])
        return list(itertools.chain(*outputs))

    def _advance_all(
        self, sequence: RunningSequence, scores: list[Tensor | Likeliest], draft: list[int]
    ) -> list[StepOutput]:
        """Choose a token from each score in turn, up to the first that differs from its guess or ends the answer."""
        outputs = []
        for own, guess in zip(scores, [*draft, None], strict=True):
            outputs.append(self._advance(sequence, own))
            if outputs[-1].finish_reason is not None or outputs[-1].token_id != guess:
                break
        sequence.lookup.learn(len(outputs) - 1)
        return outputs

    def _advance(self, sequence: RunningSequence, scores: Tensor | Likeliest) -> StepOutput:
        try:
            generated = sequence.generation.advance(scores)
        except Exception as error:
            return self._fail(sequence, error)
        if generated.finish_reason is not None:
            self._forget(sequence)
        return self._output(sequence, generated)

    def _fail(self, sequence: RunningSequence, error: Exception) -> StepOutput:
        """End only this request, unless the device is lost to the process: then every request would fail."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        _log.error("request %s failed", sequence.request_id, exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            self._room.give_back()
        return self._end(sequence, "error", f"{type(error).__name__}: {error}")

    def _end(self, sequence: RunningSequence, reason: FinishReason, error: str | None = None) -> StepOutput:
        """End a request without a further token."""
        self._forget(sequence)
        cached, tier, timings = sequence.cached_tokens, sequence.tier, sequence.timings
        return StepOutput(sequence.request_id, None, None, "", reason, cached, tier, timings, error=error)

    def _output(self, sequence: RunningSequence, generated: Generated) -> StepOutput:
        token_id, logprob, watched, text, reason = generated
        cached, tier, timings = sequence.cached_tokens, sequence.tier, sequence.timings
        told, sequence.branch_logprobs = sequence.branch_logprobs, ()
        return StepOutput(sequence.request_id, token_id, logprob, text, reason, cached, tier, timings, watched, told)

    def _forget(self, sequence: RunningSequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.state is not None:
            self._room.leave(sequence.state)
        if (loading := self._loading.pop(sequence, None)) is not None:
            loading.cancel()
        for group in (self._waiting, self._prefilling, self._decoding):
            if sequence in group:
                group.remove(sequence)


def _ms_since(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1e3


def _add_prefill(timings: RequestTimings, start_s: float) -> RequestTimings:
    return replace(timings, prefill_ms=timings.prefill_ms + _ms_since(start_s))
