"""How well a checkpoint answers from given passages, through the service's own prompt, constraint and engine.

Questions come as JSON lines: {set, passages: [[title, text], ...], question, answer or null, gold or null}; `gold` is
the number of the passage that holds the answer. Every question is answered once without the way out of `<|none|>`, and
the margin log P(none) − log P(quote) of its first step is kept: so one run gives the scores at every threshold.
With `--apart` each passage is read alone and the one with the least margin answered from, as `read_apart` does;
`--missing-words` is the service's `missing_words_nats`, and `--again` its `read_again`.
Run: `python -m bench.answers QUESTIONS.jsonl --threshold 0`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from app.advice import Advice
from app.answering import AnswerWriter
from app.likeliest import generate_likeliest
from app.prompting import QuoteFormat
from app.quotes import QuoteLimits, TokenBytes
from app.reading import none_margin, split_passages
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one question: scores of the quote it would give, and how much it would rather say none."""

    set: str
    answerable: bool
    exact: float
    f1: float
    cited: bool
    margin: float
    prompt_tokens: int
    said: str


class Reader:
    """One checkpoint, asked about given passages; `advice` says how, as far as that makes a difference here."""

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

    def ask(self, question: str, passages: Sequence[tuple[str, str]]) -> tuple[AnswerWriter, float, int]:
        """The answer it would give, its margin towards none, and the prompt's tokens."""
        evidence = evidence_of(passages)
        readings = split_passages(evidence) if self.advice.read_apart else [evidence]
        requests = [self._request(question, reading) for reading in readings]
        prompt_tokens = sum(len(request.token_ids) for request in requests)
        best = 0
        if len(readings) > 1:
            weighed = [self._generate(_one_token(request), 1)[0] for request in requests]
            margins = [self._margin(question, *those) for those in zip(readings, weighed, strict=True)]
            best = margins.index(min(margins))
        reading, request = readings[best], requests[best]
        if self.advice.read_again and len(reading.passages) == 1:
            request = self._request(question, reading, room_again=CONTEXT_TOKENS - ANSWER_TOKENS)
            prompt_tokens += len(request.token_ids)
        writer = AnswerWriter(self.tokenizer, self.format.answer_tokens(reading), reading.passages)
        outputs = self._generate(request, self.advice.quote_beginnings, question)
        for output in outputs:
            if output.token_id is not None:
                list(writer.push(output.token_id))
        list(writer.finish())
        return writer, self._margin(question, reading, outputs[0]), prompt_tokens

    def _request(self, question: str, reading: Evidence, room_again: int = 0) -> EngineRequest:
        prompt = self.format.build_prompt(question, reading, room_again=room_again)
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
            made = generate_likeliest(self.engine, request, quote, beginnings, question)
            return [output async for output in made]

        return asyncio.run(generate())

    def _margin(self, question: str, reading: Evidence, first: StepOutput) -> float:
        return none_margin(question, reading, first.watch_logprobs, self.advice.missing_words_nats)


def _one_token(request: EngineRequest) -> EngineRequest:
    return replace(request, sampling=SamplingParams(max_new_tokens=1))


def judge(reader: Reader, item: dict) -> Outcome:
    """Ask one question and compare."""
    writer, margin, prompt_tokens = reader.ask(item["question"], [tuple(p) for p in item["passages"]])
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"] or ""]
    first = writer.quoted[0].quote.text if writer.quoted else writer.text
    cited = bool(writer.quoted) and writer.quoted[0].quote.passage.ordinal == (item.get("gold") or 0) + 1
    exact = max(float(normalize_answer(first) == normalize_answer(gold)) for gold in answers)
    f1 = max(token_f1(first, gold) for gold in answers)
    return Outcome(item["set"], item["answer"] is not None, exact, f1, cited, margin, prompt_tokens, writer.text)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def summarize(name: str, outcomes: Sequence[Outcome], threshold: float) -> dict[str, float | str | int]:
    """Scores of one set when margins over `threshold` mean "not in the documents"."""
    held = [o for o in outcomes if o.answerable]
    row: dict[str, float | str | int] = {"set": name, "questions": len(outcomes)}
    row["tokens"] = round(mean([o.prompt_tokens for o in outcomes]))
    if held:
        given = [o if o.margin <= threshold else None for o in held]
        row |= {
            "EM": 100 * mean([o.exact if o else 0.0 for o in given]),
            "F1": 100 * mean([o.f1 if o else 0.0 for o in given]),
            "EM if answered": 100 * mean([o.exact for o in held]),
            "cited right": 100 * mean([float(o.cited) for o in held]),
            "refused wrongly": 100 * mean([float(o is None) for o in given]),
        }
    else:
        row["refused"] = 100 * mean([float(o.margin > threshold) for o in outcomes])
    return row


def calibrate(outcomes: Sequence[Outcome], false_refusals: float) -> float:
    """The threshold at which `false_refusals` of the answerable questions are refused."""
    margins = sorted((o.margin for o in outcomes if o.answerable), reverse=True)
    return margins[int(false_refusals * len(margins))] if margins else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--threshold", type=float, help="default: the one that refuses 8%% of what can be answered")
    parser.add_argument("--limit", type=int, help="at most so many questions a set")
    parser.add_argument("--max-quotes", type=int, default=1)
    parser.add_argument("--beginnings", type=int, default=1, help="quotes tried, of which the likeliest is taken")
    parser.add_argument("--apart", action="store_true", help="read each passage alone")
    parser.add_argument("--again", action="store_true", help="read the passage answered from once more")
    parser.add_argument("--missing-words", type=float, default=0.0, help="nats for a question of unread words")
    parser.add_argument("--outcomes", type=Path, help="write every answer there, as JSON lines")
    args = parser.parse_args()
    advice = Advice(
        quote_beginnings=args.beginnings,
        read_apart=args.apart,
        read_again=args.again,
        missing_words_nats=args.missing_words,
    )
    reader = Reader(args.model, getattr(torch, args.dtype), args.quantize, args.max_quotes, advice)
    items, counts, outcomes = [], Counter(), []
    for item in map(json.loads, args.questions.read_text().splitlines()):
        counts[item["set"]] += 1
        if args.limit is None or counts[item["set"]] <= args.limit:
            items.append(item)
    start = time.monotonic()
    for i, item in enumerate(items, start=1):
        outcomes.append(judge(reader, item))
        if sys.stderr.isatty() or i % 50 == 0:
            print(f"{i}/{len(items)} questions, {time.monotonic() - start:.0f} s", file=sys.stderr)
    asyncio.run(reader.engine.close())
    threshold = calibrate(outcomes, 0.08) if args.threshold is None else args.threshold
    run, sets = BenchRun("answers", argv=sys.argv), defaultdict(list)
    for outcome in outcomes:
        sets[outcome.set].append(outcome)
    for name, members in sets.items():
        run.add(**summarize(name, members, threshold), threshold=threshold)
    run.finish()
    if args.outcomes:
        lines = [{**item, "said": o.said, "margin": o.margin, "exact": o.exact, "f1": o.f1, "cited": o.cited}
                 for item, o in zip(items, outcomes, strict=True)]  # fmt: skip
        args.outcomes.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


if __name__ == "__main__":
    main()
