"""Contexts of running text with rule-based questions (`model.train.statements`), answerable and not.

Passages are neighbours in one document, so distractors are on topic. Unanswerable questions have their passage removed,
or combine the subject of one sentence with the property that another sentence states of something else.
Start at `StatementContexts.draw`.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from model.train.cloze import STOPWORDS
from model.train.contexts import Context, Question
from model.train.lexical import words
from model.train.statements import Fact, facts_of

COMMON_KINDS = {"what happens": 0.5, "yes/no": 0.12, "object": 0.5, "subject": 0.5, "row": 0.6, "passive": 0.6}
ATTRIBUTES = (
    ("Who wrote {s}?", "wr[io]te|written|author|creat|develop"),
    ("Who maintains {s}?", "maintain"),
    ("When was {s} first released?", r"releas|\b(?:19|20)\d\d\b"),
    ("In which year did {s} appear?", r"appear|\b(?:19|20)\d\d\b"),
    ("What is the licence of {s}?", "licen|copyright|GPL|BSD"),
    ("How much does {s} cost?", r"cost|price|\$|free"),
    ("In which programming language is {s} written?", r"language|written|python|java|\bC\b|perl"),
    ("Which port does {s} use?", "port"),
    ("What is the default timeout of {s}?", "time|second|default"),
    ("How much memory does {s} need?", "memory|byte|KB|MB|GB|size"),
    ("How many users does {s} have?", "user"),
    ("Where is {s} stored?", "stor|kept|director|locat|path|file|/"),
    ("Who recommends {s}?", "recommend"),
    ("Why was {s} removed?", "remov|drop|delet|deprecat|obsolet"),
    ("Which version introduced {s}?", r"version|introduc|since|added|\d\.\d"),
    ("What is the maximum number of {s}?", r"maxim|limit|at most|up to|\d"),
    ("How fast is {s}?", "fast|speed|slow|perform|second"),
    ("What colour is {s}?", "colou?r|red|green|blue|black|white|gr[ea]y"),
    ("Which option turns {s} off?", "disabl|turn|off|option|--"),
    ("What should I use instead of {s}?", "instead|rather|replac|alternativ"),
    ("How often is {s} updated?", "often|every|updat|daily|week|interval"),
    ("Which key opens {s}?", "key|press|ctrl|shift"),
    ("Who invented {s}?", "invent|discover|author|creat"),
    ("What happens if {s} is missing?", "missing|absent|not found|without|omit|unset|not set|if no|error"),
    ("Does {s} work on Windows?", "windows|platform|system"),
    ("How do I install {s}?", "install|apt|package|download|pip|build|compil"),
)


class StatementContexts:
    """Contexts made from (title, text) documents."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self.texts = [(title, text) for title, text in texts if len(text) > 500]
        if not self.texts:
            raise ValueError("no text is long enough (500 characters) to ask about")

    def draw(self, rng: random.Random, max_chars: int, shortest: int = 250) -> Context | None:
        """A context of about `max_chars` in passages of `shortest` to 1,100 characters; None if no question fits."""
        title, text = rng.choice(self.texts)
        passages = self._passages(title, text, max_chars, rng.randint(shortest, max(shortest + 1, 1100)), rng)
        chosen = choose_facts(passages, rng, limit=2 + max_chars // 110)
        if not chosen:
            return None
        lost = {at for at, _ in chosen if len(passages) > 2 and rng.random() < 0.13}
        kept = [i for i in range(len(passages)) if i not in lost]
        place = {old: new for new, old in enumerate(kept)}
        held = tuple(passages[i] for i in kept)
        questions = [
            Question(fact.question, None, -1, -1)
            if at in lost
            else Question(fact.question, fact.answer, place[at], fact.start)
            for at, fact in chosen
        ]
        questions += self._near_misses([fact for _, fact in chosen], held, rng, count=len(questions) // 6)
        rng.shuffle(questions)
        return Context(held, tuple(questions))

    @staticmethod
    def _passages(title: str, text: str, max_chars: int, size: int, rng: random.Random) -> list[tuple[str, str]]:
        """Paragraphs from a random position on, merged into passages of about `size` characters."""
        start = rng.randrange(max(1, len(text) - max_chars)) if len(text) > max_chars else 0
        paragraphs = re.split(
            r"\n{2,}|(?<=[.!?]) (?=[A-Z])" if size < 400 else r"\n{2,}", text[start : start + max_chars]
        )
        passages, body = [], ""
        for paragraph in paragraphs[bool(start) :]:
            if body and len(body) + len(paragraph) > 1.3 * size:
                passages.append((title, body))
                body = ""
            body = f"{body}\n{paragraph}" if body else paragraph[:1500]
        passages = [*passages, (title, body)] if body.strip() else passages
        rng.shuffle(passages)
        return passages

    @staticmethod
    def _near_misses(
        facts: Sequence[Fact], passages: Sequence[tuple[str, str]], rng: random.Random, count: int
    ) -> list[Question]:
        """Questions about subjects of these passages that the passages do not answer."""
        named = [fact for fact in facts if fact.subject and any(fact.subject in body for _, body in passages)]
        sentences = [s for _, body in passages for s in re.split(r"(?<=[.!?])\s|\n", body)]
        made = []
        for _ in range(4 * count):
            if not named or len(made) >= count:
                break
            about, like = rng.choice(named), rng.choice(named)
            near = " ".join(s for s in sentences if about.subject in s)
            if rng.random() < 0.5:
                frame, signs = rng.choice(ATTRIBUTES)
                fits = not re.search(signs, near, re.I)
            else:
                frame = like.frame
                telling = {w for w in words(frame) if w not in STOPWORDS}
                fits = about.subject != like.subject and len(telling & set(words(near))) < 0.5 * len(telling)
            if fits:
                made.append(Question(frame.replace("{s}", about.subject), None, -1, -1))
        return made


def ask_more(context: Context, rng: random.Random) -> Context:
    """The context with additional rule-based questions on its passages, about one per 160 characters."""
    chosen = choose_facts(context.passages, rng, limit=context.chars // 160)
    more = tuple(Question(fact.question, fact.answer, at, fact.start) for at, fact in chosen)
    return replace(
        context, questions=tuple(rng.sample([*context.questions, *more], len(context.questions) + len(more)))
    )


def choose_facts(passages: Sequence[tuple[str, str]], rng: random.Random, limit: int) -> list[tuple[int, Fact]]:
    """(passage, fact) pairs: one question per sentence, rare kinds first, none that another passage might answer."""
    vocabularies = [set(words(f"{title} {body}")) for title, body in passages]
    drawn = [(at, fact) for at, (_, body) in enumerate(passages) for fact in facts_of(body)]
    ranked = [(rng.random() ** (1 / COMMON_KINDS.get(fact.kind, 1.0)), at, fact) for at, fact in drawn]
    chosen, asked, taken = [], set(), defaultdict(list)
    for _, at, fact in sorted(ranked, key=lambda item: -item[0]):
        if len(chosen) == limit:
            break
        telling = {w for w in words(fact.question) if w not in STOPWORDS}
        overlaps = [len(telling & vocabulary) for vocabulary in vocabularies]
        rivals = [n for i, n in enumerate(overlaps) if i != at]
        near = any(abs(fact.start - start) < 60 for start in taken[at])
        if near or fact.question in asked or (rivals and max(rivals) >= overlaps[at]):
            continue
        if len(fact.answer) > 25 and any(fact.answer in body for i, (_, body) in enumerate(passages) if i != at):
            continue
        taken[at].append(fact.start)
        asked.add(fact.question)
        chosen.append((at, fact))
    return chosen
