"""How well a checkpoint answers from given passages, with the service's own prompt, constraint and engine.

Questions are JSON lines: {set, passages: [[title, text], ...], question, answer or null, gold or null}; `gold` is the
index of the passage with the answer. Every question is answered once with `<|none|>` disallowed, and the margin
log P(none) − log P(quote) of the first step, plus what the service adds to it, is recorded, so that one run gives the
scores at every threshold.

Modes: `rag` reads all passages in one prompt; `rag-apart` reads each alone and answers from the one with the lowest
margin, as `read_apart` does; `full_context` has all passages in one document, each under its title.
`--missing-words`, `--ask-back` and `--verdict` are the service's settings of these names.
The scores are defined in bench/answer_scores.py. Run: `python -m bench.answers QUESTIONS.jsonl --threshold 0`, or with
`--modes rag-apart rag full_context --picture answers.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.advice import Advice
from app.answering import AnswerWriter
from app.likeliest import QuoteSearch, ask_back_by, generate_likeliest, verdict_of
from app.prompting import QuoteFormat
from app.quotes import QuoteLimits, TokenBytes
from app.reading import chance_nats, none_margin, split_passages
from bench.answer_scores import GoldPlace, Outcome, draw, tabulate
from bench.asking import evidence_of
from bench.runs import BenchRun
from model import load_model
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest, StepOutput
from model.engine_thread import EngineThread
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from model.train.scoring import normalize_answer, token_f1
from retrieval.types import Evidence

SHIPPED = Path(__file__).parent.parent / "model" / "checkpoints" / "jamba-small"
CONTEXT_TOKENS, ANSWER_TOKENS = 65_536, 256
MODES = ("rag-apart", "rag", "full_context")


class Reader:
    """One checkpoint, asked about given passages; `advice` says how, but for reading apart, which is a mode here."""

    def __init__(
        self, checkpoint: Path, dtype: torch.dtype, quantize: str | None, max_quotes: int, advice: Advice
    ) -> None:
        model = load_model(checkpoint, dtype=dtype, quantize=quantize)
        self.tokenizer = Tokenizer.load(checkpoint)
        self.format = QuoteFormat(self.tokenizer, TokenBytes.read(checkpoint), CONTEXT_TOKENS)
        cache = PrefixCache([DeviceStateStore(1 << 28)], b"bench", PlanSettings())
        self.engine = EngineThread(JambaEngine(model, self.tokenizer, cache, max_context_tokens=CONTEXT_TOKENS))
        self.advice = advice
        self.limits = QuoteLimits(max_quotes=max_quotes, allow_none=False)

    def ask(self, question: str, evidence: Evidence, apart: bool = False) -> tuple[AnswerWriter, float, int]:
        """The answer with refusals disallowed, its `none` margin, and the number of prompt tokens."""
        readings = split_passages(evidence) if apart else [evidence]
        requests = [self._request(question, reading) for reading in readings]
        prompt_tokens = sum(len(request.token_ids) for request in requests)
        best = 0
        if len(readings) > 1:
            weighed = [self._generate(_one_token(request), 1)[0] for request in requests]
            margins = [self._margin(question, *those) for those in zip(readings, weighed, strict=True)]
            best = margins.index(min(margins))
        reading = readings[best]
        outputs = self._generate(requests[best], self.advice.quote_beginnings, question)
        margin = self._margin(question, reading, outputs[0]) - self.advice.verdict * verdict_of(outputs)
        margin += chance_nats(evidence, len(readings))
        writer = AnswerWriter(self.tokenizer, self.format.answer_tokens(reading), reading.passages, question)
        for output in outputs:
            if output.token_id is not None:
                list(writer.push(output.token_id))
        list(writer.finish())
        return writer, margin, prompt_tokens

    def count_evidence(self, passages: Sequence[tuple[str, str]]) -> int:
        """Tokens of the passages by the service's count, each as its own document, independent of the mode."""
        return sum(self.format.count_tokens([passage]) for passage in evidence_of(passages).passages)

    def _request(self, question: str, reading: Evidence) -> EngineRequest:
        prompt = self.format.build_prompt(question, reading)
        return EngineRequest(
            prompt.token_ids,
            prompt.boundaries,
            SamplingParams(max_new_tokens=ANSWER_TOKENS, stop_token_ids=self.format.stop_ids),
            constraint=self.format.constrain(reading, self.limits),
            watch_tokens=self.format.decision_ids,
        )

    def _generate(self, request: EngineRequest, beginnings: int, question: str = "") -> list[StepOutput]:
        async def generate() -> list[StepOutput]:
            quote = self.format.decision_ids[0]
            back = ask_back_by(self.format, question, self.advice.ask_back, self.advice.verdict)
            search = QuoteSearch(quote, beginnings, question, back=back)
            made = generate_likeliest(self.engine, request, search)
            return [output async for output in made]

        return asyncio.run(generate())

    def _margin(self, question: str, reading: Evidence, first: StepOutput) -> float:
        return none_margin(question, reading, first.watch_logprobs, self.advice.missing_words_nats)


def _one_token(request: EngineRequest) -> EngineRequest:
    return replace(request, sampling=SamplingParams(max_new_tokens=1))


def lay_out(item: dict[str, Any], mode: str) -> tuple[Evidence, GoldPlace | None]:
    """The evidence of an item in this mode, and the location of its gold answer in it."""
    passages = [(title, text) for title, text in item["passages"]]
    titled = [f"{title}\n\n{text}" for title, text in passages]
    whole = mode == "full_context"
    evidence = evidence_of(
        [("Documents", "\n\n".join(titled))] if whole else passages, "full_context" if whole else "rag"
    )
    if item["answer"] is None:
        return evidence, None
    number, text = item.get("gold") or 0, passages[item.get("gold") or 0][1]
    start = len("\n\n".join(titled[: number + 1])) - len(text) if whole else 0
    return evidence, GoldPlace.find(1 if whole else number + 1, start, text, _answers(item))


def _answers(item: dict[str, Any]) -> list[str]:
    return item["answer"] if isinstance(item["answer"], list) else [item["answer"] or ""]


def judge(reader: Reader, item: dict[str, Any], mode: str = "rag") -> Outcome:
    """Ask one question in one mode and compare."""
    evidence, gold = lay_out(item, mode)
    writer, margin, prompt_tokens = reader.ask(item["question"], evidence, apart=mode == "rag-apart")
    quotes = [quoted.quote for quoted in writer.quoted]
    first = quotes[0].text if quotes else writer.text
    return Outcome(
        set=item["set"],
        answerable=item["answer"] is not None,
        exact=max(float(normalize_answer(first) == normalize_answer(answer)) for answer in _answers(item)),
        f1=max(token_f1(first, answer) for answer in _answers(item)),
        cited=bool(quotes) and gold is not None and gold.in_passage(quotes[0]),
        margin=margin,
        prompt_tokens=prompt_tokens,
        said=writer.text,
        mode=mode,
        citations=tuple(gold is not None and gold.is_supported_by(quote) for quote in quotes),
        evidence_tokens=reader.count_evidence(item["passages"]),
    )


def read_items(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` questions of each set in a file."""
    items, counts = [], Counter[str]()
    for item in map(json.loads, path.read_text().splitlines()):
        counts[item["set"]] += 1
        if limit is None or counts[item["set"]] <= limit:
            items.append(item)
    return items


def ask_all(reader: Reader, items: Sequence[dict[str, Any]], modes: Sequence[str]) -> list[Outcome]:
    """All questions in each mode, mode by mode."""
    outcomes, start = [], time.monotonic()
    for mode in modes:
        for i, item in enumerate(items, start=1):
            outcomes.append(judge(reader, item, mode))
            if sys.stderr.isatty() or i % 50 == 0:
                print(f"{mode}: {i}/{len(items)} questions, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return outcomes


def write_outcomes(items: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one JSON line per answer; each mode has all items once."""
    kept = ("mode", "said", "margin", "exact", "f1", "cited", "citations", "evidence_tokens")
    lines = (items[i % len(items)] | {name: getattr(o, name) for name in kept} for i, o in enumerate(outcomes))
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("int8", "w8a8"))
    parser.add_argument("--threshold", type=float, help="default: the one that refuses 8%% of what can be answered")
    parser.add_argument("--limit", type=int, help="at most so many questions a set")
    parser.add_argument("--max-quotes", type=int, default=1)
    parser.add_argument("--beginnings", type=int, default=1, help="quotes tried, of which the likeliest is taken")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--modes", choices=MODES, nargs="+", default=["rag"])
    modes.add_argument(
        "--apart", action="store_const", const=["rag-apart"], dest="modes", help="read each passage alone: rag-apart"
    )
    parser.add_argument("--ask-back", type=float, default=0.0, help="weight of log P(question | quote)")
    parser.add_argument("--verdict", type=float, default=0.0, help="weight of the verdict on a quote")
    parser.add_argument("--missing-words", type=float, default=0.0, help="nats if all words are missing in the passage")
    parser.add_argument("--evidence-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048], help="upper bounds")
    parser.add_argument("--outcomes", type=Path, help="write every answer there, as JSON lines")
    parser.add_argument("--picture", type=Path, help="PNG of the scores by evidence size; needs matplotlib")
    args = parser.parse_args()
    advice = Advice(
        quote_beginnings=args.beginnings,
        missing_words_nats=args.missing_words,
        ask_back=args.ask_back,
        verdict=args.verdict,
    )
    reader = Reader(args.model, getattr(torch, args.dtype), args.quantize, args.max_quotes, advice)
    items = read_items(args.questions, args.limit)
    outcomes = ask_all(reader, items, args.modes)
    asyncio.run(reader.engine.close())
    run = BenchRun("answers", argv=sys.argv)
    for row in tabulate(outcomes, args.threshold, sorted(args.evidence_tokens)):
        run.add(**row)
    run.finish()
    if args.outcomes:
        write_outcomes(items, outcomes, args.outcomes)
    if args.picture:
        draw(run.rows, args.picture)


if __name__ == "__main__":
    main()
