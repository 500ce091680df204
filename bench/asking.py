"""Asks a checkpoint questions about one long text, with the service's own prompt, constraint and engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.model_loading import LoadedModel, build_model
from app.quotes import QuoteLimits
from app.settings import load_settings
from model.engine_request import EngineRequest
from model.sampling import SamplingParams
from retrieval.types import Evidence, Passage

_NONCE = "5eb1f2a9c07d"


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    prompt_tokens: int
    seconds: float


def evidence_of(passages: Sequence[tuple[str, str]], mode: Literal["rag", "full_context"] = "rag") -> Evidence:
    """Titles and texts as evidence. A text is a document, and has one number as every document has: what the prompt's
    format knows of one is never another's."""
    spans = [
        Passage(hashlib.sha256(f"{i} {text}".encode()).hexdigest(), 1, "bench", i, title, title, text, 0, len(text))
        for i, (title, text) in enumerate(passages, start=1)
    ]
    return Evidence(tuple(spans), mode, 0)


class Asker:
    """One checkpoint. Checkpoints without the quote tokens are asked through their chat template."""

    def __init__(self, model: LoadedModel, max_quotes: int) -> None:
        self._model = model
        self._limits = QuoteLimits(max_quotes=max_quotes, allow_none=False)

    def count_tokens(self, text: str) -> int:
        return len(self._model.tokenizer.encode(text))

    def ask(self, question: str, text: str, max_new_tokens: int) -> Reply:
        """Answer a question with `text` as the only document. Raises ContextTooLong."""
        form, engine = self._model.format, self._model.engine
        evidence = evidence_of([("Text", text)], "full_context")
        prompt = form.build_prompt(question, evidence)
        start = time.perf_counter()
        engine.add(
            EngineRequest(
                prompt.token_ids,
                prompt.boundaries,
                SamplingParams(max_new_tokens, stop=form.stop_texts, stop_token_ids=form.stop_ids),
                constraint=form.constrain(evidence, self._limits),
            )
        )
        reader = form.read_answer(evidence)
        while engine.has_work():
            for output in engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.token_id is not None:
                    list(reader.push(output.token_id))
        list(reader.finish())
        return Reply(reader.text or reader.unchecked_text, len(prompt.token_ids), time.perf_counter() - start)


@contextmanager
def open_asker(checkpoint: Path, max_context_tokens: int, quantize: str, max_quotes: int) -> Iterator[Asker]:
    """Load a checkpoint; nothing is cached between questions, so that each needs a full prefill."""
    groups = {
        "model": {"path": checkpoint, "max_context_tokens": max_context_tokens, "quantize": quantize},
        "cache": {"host_max_bytes": 0, "gpu_max_bytes": 0},
        "redis": {"url": None},
    }
    with ExitStack() as stack:
        yield Asker(build_model(load_settings(env_file=None, **groups), stack, True, _NONCE), max_quotes)
