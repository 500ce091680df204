"""Scores of answers from given passages: right words, right citations, right refusals, by set, mode and evidence size.

*Citation recall* and *precision* are those of ALCE: a statement is recalled if its citations together support it; a
citation is precise if its statement is recalled and it contributes to that. Both are averaged over answers. The
difference is how support is decided. ALCE asks a model whether the cited passage entails the statement (for short
answers, the question followed by the answer). Here quotes are verbatim, so their passage always entails them; only the
place can be wrong. So a citation supports the answer if its quote overlaps the gold answer in the gold passage: any
occurrence of the gold words there, or the whole passage if it does not have these exact words.

- A question has one gold answer, so an answer is one statement, and all its quotes are citations of it. Recall is 1 if
  one of them supports it; precision is the share of those that do. With one quote per answer they are equal.
- A refusal makes no statement and counts in neither, just as ALCE skips outputs without a sentence. *Refusal accuracy*
  covers it: correct refusals and non-refusals, of all questions.
- Answers to unanswerable questions, and answers without citations, have 0 in both.
- Other words of the gold passage do not support; "cited right" counts them, of all questions with an answer.

Source: Gao et al., 2305.14627; princeton-nlp/ALCE eval.py::compute_autoais, with its statements of QAMPARI.
Start at `tabulate`. Nothing here asks a model; bench/answers.py does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.quotes import LocatedQuote
from model.train.scoring import normalize_answer

FALSE_REFUSALS = 0.08  # at the default threshold
Span = tuple[int, int]  # character offsets in a document
_ALL = {"set": "all", "evidence tokens": "all"}


@dataclass(frozen=True, slots=True)
class GoldPlace:
    """The location of a gold answer: the passage in document d<ordinal>, and the occurrences of its words there."""

    ordinal: int
    passage: Span
    answers: tuple[Span, ...]

    @classmethod
    def find(cls, ordinal: int, start: int, text: str, answers: Sequence[str]) -> GoldPlace:
        """Find the answers in the passage `text`, which begins at `start` of its document, ignoring white space."""
        spans = {(start + begin, start + end) for one in answers for begin, end in _places(one, text)}
        passage = (start, start + len(text))
        return cls(ordinal, passage, tuple(sorted(spans)) or (passage,))

    def in_passage(self, quote: LocatedQuote) -> bool:
        return bool(self._shared(quote, self.passage))

    def is_supported_by(self, quote: LocatedQuote) -> bool:
        """Whether the quote overlaps the answer in normalized words, so that an article alone does not count."""
        return any(normalize_answer(self._shared(quote, span)) for span in self.answers)

    def _shared(self, quote: LocatedQuote, span: Span) -> str:
        if quote.passage.ordinal != self.ordinal:
            return ""
        start, end = max(span[0], quote.char_start), min(span[1], quote.char_end)
        return quote.text[start - quote.char_start : max(start, end) - quote.char_start]


def _places(answer: str, text: str) -> list[Span]:
    """Occurrences of the answer as whole words, or otherwise anywhere."""
    if not (words := answer.split()):
        return []
    spelled = r"\s+".join(map(re.escape, words))
    before, after = (r"(?<!\w)" if words[0][0].isalnum() else ""), (r"(?!\w)" if words[-1][-1].isalnum() else "")
    return [found.span() for found in re.finditer(before + spelled + after, text)] or [
        found.span() for found in re.finditer(spelled, text)
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one question: scores of the answer it would give, and how much it would rather say none.

    `citations`: of each citation in it, whether it supports. `evidence_tokens`: of all passages, in whatever mode.
    """

    set: str
    answerable: bool
    exact: float
    f1: float
    cited: bool
    margin: float
    prompt_tokens: int
    said: str
    mode: str = "rag"
    citations: tuple[bool, ...] = ()
    evidence_tokens: int = 0


def citation_recall(citations: Sequence[bool]) -> float:
    """1 if any citation supports the answer, else 0."""
    return float(any(citations))


def citation_precision(citations: Sequence[bool]) -> float:
    """Share of the citations that support the answer; 0 if there are none."""
    return sum(citations) / len(citations) if citations else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def summarize(outcomes: Sequence[Outcome], threshold: float) -> dict[str, float | int]:
    """Scores in % if margins over `threshold` count as refusals; scores without data are left out."""
    held, others = ([o for o in outcomes if o.answerable is answerable] for answerable in (True, False))
    row: dict[str, float | int] = {"questions": len(outcomes)}
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
    if others:
        row["refused"] = 100 * mean([float(o.margin > threshold) for o in others])
    if cited := [o.citations for o in outcomes if o.margin <= threshold]:
        row["citation recall"] = 100 * mean([citation_recall(citations) for citations in cited])
        row["citation precision"] = 100 * mean([citation_precision(citations) for citations in cited])
    row["refusal accuracy"] = 100 * mean([float((o.margin <= threshold) is o.answerable) for o in outcomes])
    return row


def calibrate(outcomes: Sequence[Outcome], false_refusals: float) -> float:
    """The threshold at which `false_refusals` of the answerable questions are refused."""
    margins = sorted((o.margin for o in outcomes if o.answerable), reverse=True)
    return margins[int(false_refusals * len(margins))] if margins else 0.0


def tabulate(outcomes: Sequence[Outcome], threshold: float | None, edges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows a mode and set, then a mode, then a mode and size of the evidence, of which `edges` are the upper bounds.

    Without `threshold` each mode has its own, for it has its own margins.
    """
    modes = _group(outcomes, lambda o: o.mode)
    thresholds = {
        mode: calibrate(members, FALSE_REFUSALS) if threshold is None else threshold for mode, members in modes.items()
    }
    kinds: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
        ("set", lambda o: o.set),
        ("set", lambda o: "all"),
        ("evidence tokens", lambda o: name_size(o.evidence_tokens, edges)),
    )
    for column, name_of in kinds:
        for mode, members in modes.items():
            ordered = members if column == "set" else sorted(members, key=lambda o: o.evidence_tokens)
            for name, those in _group(ordered, name_of).items():
                scores = summarize(those, thresholds[mode])
                yield {"mode": mode, **_ALL, column: name, **scores, "threshold": thresholds[mode]}


def _group(outcomes: Iterable[Outcome], name_of: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    groups = defaultdict[str, list[Outcome]](list)
    for outcome in outcomes:
        groups[name_of(outcome)].append(outcome)
    return dict(groups)


def name_size(tokens: int, edges: Sequence[int]) -> str:
    """The label of the bucket that contains `tokens`; `edges`: ascending upper bounds."""
    place = bisect_left(edges, tokens)
    return f"to {edges[place]}" if place < len(edges) else f"over {edges[-1]}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot scores by evidence size, one line per mode."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sized = [row for row in rows if row["evidence tokens"] != "all"]
    sizes = list(dict.fromkeys(row["evidence tokens"] for row in sized))
    scores = ("EM", "F1", "citation recall", "citation precision", "refusal accuracy")
    figure, axes = plt.subplots(1, len(scores), figsize=(15, 3), sharey=True, layout="constrained")
    for mode in dict.fromkeys(row["mode"] for row in sized):
        for axis, score in zip(axes, scores, strict=True):
            shown = {row["evidence tokens"]: row.get(score, float("nan")) for row in sized if row["mode"] == mode}
            axis.plot(range(len(sizes)), [shown.get(size, float("nan")) for size in sizes], marker="o", label=mode)
            axis.set(title=score, ylim=(0, 104), xticks=range(len(sizes)), xticklabels=sizes)
            axis.tick_params(axis="x", labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("%")
    axes[len(scores) // 2].set_xlabel("tokens of evidence")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
