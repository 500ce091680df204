"""Generates unlimited grounded questions: invented facts in many styles and wordings, with exact answers.

`generate_context(rng, n_passages)` returns passages about invented devices, firms, people, settings, journeys … and
questions on them, of which a share is unanswerable (same thing, another property; another thing, same property).
`hide_needles` inserts facts into other passages. Deterministic given the random generator.

Wordings are in genres.py and templates/. Questions on real text: pairs.py.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.train.genres import Property, Thing, ask, capital, expand, genres, idle, make_thing, mention

_VALUE, _VALUE_END, _SAID, _SAID_END, _IDS = "\ue000", "\ue001", "\ue002", "\ue003", 0xE100


@dataclass(frozen=True, slots=True)
class Span:
    """`text` occurs in passage number `passage` at character `start`."""

    passage: int
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the spans that answer it, in order; none if it is unanswerable."""

    text: str
    spans: tuple[Span, ...]
    kind: str  # short, sentence, two, other-property, other-thing


@dataclass(frozen=True, slots=True)
class Context:
    """(title, text) passages and questions about them."""

    passages: tuple[tuple[str, str], ...]
    questions: tuple[Question, ...]


@dataclass(slots=True)
class _Fact:
    thing: Thing
    prop: Property
    value: str
    spans: dict[str, Span] = field(default_factory=dict)  # "short" and, unless in a table, "sentence"


class _Builder:
    """Collects things, facts and passages of one context."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.things: list[Thing] = []
        self.facts: list[_Fact] = []
        self.passages: list[tuple[str, str]] = []

    def new_fact(self, thing: Thing, prop: Property) -> int:
        value = expand(self.rng.choice(prop.values), self.rng, thing.variables)
        self.facts.append(_Fact(thing, prop, value))
        thing.facts[prop.label] = len(self.facts) - 1
        return len(self.facts) - 1

    def say(self, number: int, reference: str) -> str:
        """The fact as a sentence, with markers for `add_passage`."""
        fact, rng = self.facts[number], self.rng
        marked = f"{_VALUE}{chr(_IDS + number)}{fact.value}{_VALUE_END}"
        raised = f"{_VALUE}{chr(_IDS + number)}{capital(fact.value)}{_VALUE_END}"
        names = fact.thing.variables | {"e": reference, "E": capital(reference), "v": marked, "v0": raised}
        other = expand(rng.choice(fact.prop.values), rng, fact.thing.variables)
        text = expand(rng.choice(fact.prop.statements), rng, names | {"V": other if other != fact.value else "another"})
        if fact.value.endswith("."):
            text = text.replace(f"{_VALUE_END}.", _VALUE_END)
        return f"{_SAID}{chr(_IDS + number)}{text}{_SAID_END}"

    def cell(self, number: int) -> str:
        """The bare value of the fact, with markers."""
        return f"{_VALUE}{chr(_IDS + number)}{self.facts[number].value}{_VALUE_END}"

    def add_passage(self, title: str, marked: str) -> None:
        """Add a passage: strip the markers and record the span of each value and sentence."""
        index, plain, size, opened = len(self.passages), list[str](), 0, list[tuple[str, int, int]]()
        characters = iter(marked)
        for character in characters:
            if character in (_VALUE, _SAID):
                opened.append((character, ord(next(characters)) - _IDS, size))
            elif character in (_VALUE_END, _SAID_END):
                mark, number, start = opened.pop()
                kind = "short" if mark == _VALUE else "sentence"
                self.facts[number].spans[kind] = Span(index, start, "".join(plain)[start:])
            else:
                plain.append(character)
                size += 1
        self.passages.append((title, "".join(plain)))


def generate_context(
    rng: random.Random, n_passages: int, n_questions: int = 6, unanswerable: float = 0.25, tables: float = 0.25
) -> Context:
    """A context of `n_passages` passages with up to `n_questions` questions, of which a share is unanswerable.

    `tables`: share of single-passage topics that become a table.
    """
    builder = _Builder(rng)
    while len(builder.passages) < n_passages:
        genre = rng.choice(genres())
        siblings = min(n_passages - len(builder.passages), rng.choice([1, 1, 2, 2, 3, 4]))
        first = make_thing(genre, rng)
        if siblings == 1 and rng.random() < tables:
            _add_table(builder, first)
            continue
        labels = rng.sample(genre.properties, k=rng.randint(3, len(genre.properties)))
        for number in range(siblings):
            together = [first if number == 0 else make_thing(genre, rng, like=first)]
            together += [make_thing(genre, rng, like=first) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
            _add_told(builder, together, labels)
    order = rng.sample(range(n_passages), n_passages)
    return _finish(builder, order, n_questions, unanswerable)


def hide_needles(
    rng: random.Random, passages: Sequence[tuple[str, str]], n_needles: int, unanswerable: float = 0.2
) -> Context:
    """The given passages with `n_needles` invented facts inserted between sentences, and a question on each."""
    builder, places = _Builder(rng), dict[int, list[int]]()
    for _ in range(n_needles):
        near = rng.choice(builder.things) if builder.things and rng.random() < 0.4 else None
        genre = near.genre if near else rng.choice(genres())
        thing = make_thing(genre, rng, like=near)
        builder.things.append(thing)
        told = [p for p in genre.properties if any("{e}" in s or "{E}" in s for s in p.statements)]
        fact = builder.new_fact(thing, rng.choice(told or genre.properties))
        places.setdefault(rng.randrange(len(passages)), []).append(fact)
    for index, (title, text) in enumerate(passages):
        sentences = re.split(r"(?<=[.!?])(?= )|(?<=\n)", text)
        for number in places.get(index, []):
            sentences.insert(rng.randint(0, len(sentences)), " " + _needle(builder, number) + " ")
        builder.add_passage(title, re.sub(r" {2,}", " ", "".join(sentences)).strip())
    return _finish(builder, list(range(len(passages))), n_needles, unanswerable)


def _needle(builder: _Builder, number: int) -> str:
    """The fact as a sentence that always names its thing in full."""
    thing = builder.facts[number].thing
    full = mention(thing, builder.rng)
    said = builder.say(number, full)
    if full.lower() in said.lower() or thing.variables["name"].lower() in said.lower():
        return said
    return builder.rng.choice(["About {}: ", "{}. ", "On {}: "]).format(capital(full)) + said


def _add_told(builder: _Builder, things: Sequence[Thing], labels: Sequence[Property]) -> None:
    """Add a passage that states some of these properties of one or more things, in a random style."""
    rng = builder.rng
    style = rng.choice(["prose", "prose", "prose", "prose", "bullets", "pairs", "faq", "sections"])
    title = mention(rng.choice(things), rng, "title")
    if len(things) > 1:
        title = capital(f"{_plural(things[0])}: {rng.choice(['notes', 'overview', 'summary', 'collected facts'])}")
    told = []
    for thing in things:
        chosen = [p for p in labels if rng.random() < 0.75] or list(labels[:1])
        told.append(_tell(builder, thing, chosen, style, title))
    builder.add_passage(title, "\n\n".join(told))


def _tell(builder: _Builder, thing: Thing, properties: Sequence[Property], style: str, title: str) -> str:
    """The properties of the thing as text with markers; a thing that the title does not name is named first."""
    rng = builder.rng
    builder.things.append(thing)
    facts = [builder.new_fact(thing, p) for p in properties]
    named = False
    lines: list[str] = []
    for number in facts:
        prop = builder.facts[number].prop
        reference = mention(thing, rng, "short" if named and rng.random() < 0.6 else "e")
        if style == "pairs" and prop.bare and rng.random() < 0.85:
            lines.append(f"{capital(prop.label)}{rng.choice([': ', ': ', ' – '])}{builder.cell(number)}")
            continue
        said = builder.say(number, reference)
        named = named or thing.variables["name"] in said
        if style == "faq":
            asked = expand(rng.choice(prop.questions), rng, thing.variables | {"e": mention(thing, rng)})
            said = f"{capital(asked)}\n{said}"
        elif style == "sections":
            said = f"{capital(prop.label)}\n{said}"
        lines.append(said)
    if style != "pairs":
        lines += idle(thing, rng, rng.choice([0, 1, 1, 2, 3]))
    if style in ("prose", "bullets") and len(lines) > 2:
        tail = lines[1:]
        rng.shuffle(tail)
        lines = [lines[0], *tail]
    opener = "" if named or thing.variables["name"] in title else capital(mention(thing, rng)) + "\n"
    return opener + _lay_out(lines, style, rng)


def _lay_out(lines: list[str], style: str, rng: random.Random) -> str:
    if style == "prose":
        text = lines[0]
        for line in lines[1:]:
            text += rng.choice([" ", " ", " ", " ", "\n\n"]) + line
        return text
    if style == "bullets":
        mark = rng.choice(["- ", "* ", "• "])
        return "\n".join(mark + line for line in lines)
    return "\n".join(lines) if style == "pairs" else "\n\n".join(lines)


def _singular(thing: Thing) -> str:
    return thing.variables.get("kind", thing.genre.name.replace("-", " "))


def _plural(thing: Thing) -> str:
    topic = _singular(thing)
    return topic[:-1] + "ies" if topic[-1] == "y" else topic if topic[-1] == "s" else topic + "s"


def _lay_out_table(header: list[str], rows: list[list[str]], rng: random.Random) -> list[str]:
    """The table in Markdown or in a form used by the service: cells separated by bars, or prefixed by column name."""
    style = rng.random()
    if style < 0.25:
        marks = "|" + " --- |" * len(header)
        head, *lines = (f"| {' | '.join(row)} |" for row in [header, *rows])
        return [head, marks, *lines]
    if style < 0.6:
        return [" | ".join(row) for row in [header, *rows]]
    named = [" | ".join(f"{name}: {cell}" for name, cell in zip(header, row, strict=True)) for row in rows]
    return [" | ".join(header), *named] if rng.random() < 0.3 else named


def _add_table(builder: _Builder, first: Thing) -> None:
    """Add a passage that is a table: one row per thing, one column per property."""
    rng = builder.rng
    usable = [p for p in first.genre.properties if p.bare]
    columns = rng.sample(usable, k=min(len(usable), rng.randint(2, 4)))
    things = [first] + [make_thing(first.genre, rng, like=first) for _ in range(rng.randint(2, 9))]
    header = [rng.choice(["Name", capital(_singular(first))]), *(capital(p.label) for p in columns)]
    rows = []
    for thing in things:
        builder.things.append(thing)
        rows.append([capital(thing.variables["name"]), *(builder.cell(builder.new_fact(thing, p)) for p in columns)])
    lines = _lay_out_table(header, rows, rng)
    wording = rng.choice(["Overview: {}", "All {} at a glance", "List of {}", "Comparison of {}", "Records of {}"])
    title = wording.format(_plural(first))
    intro = rng.choice(["", "", "The table gives the current values.\n", "Values as of this year.\n"])
    builder.add_passage(capital(title), intro + "\n".join(lines))


def _finish(builder: _Builder, order: list[int], n_questions: int, unanswerable: float) -> Context:
    """Shuffle the passages and choose the questions."""
    rng, place = builder.rng, {old: new for new, old in enumerate(order)}
    for fact in builder.facts:
        fact.spans = {kind: Span(place[s.passage], s.start, s.text) for kind, s in fact.spans.items()}
    questions: list[Question] = []
    for number in rng.sample(range(len(builder.facts)), k=min(len(builder.facts), n_questions)):
        fact = builder.facts[number]
        missing = _unanswerable(builder, fact) if rng.random() < unanswerable else None
        questions.append(missing or _answerable(builder, fact))
    return Context(tuple(builder.passages[i] for i in order), tuple(questions))


def _answerable(builder: _Builder, fact: _Fact) -> Question:
    rng, thing = builder.rng, fact.thing
    chance = rng.random()
    others = [n for n in thing.facts.values() if builder.facts[n] is not fact and builder.facts[n].prop.bare]
    if chance < 0.06 and others and fact.prop.bare:
        second = builder.facts[rng.choice(others)]
        wording = rng.choice(["What are the {} and the {} of {}?", "Give the {} and the {} of {}.", "{} and {} of {}?"])
        text = capital(wording.format(fact.prop.label, second.prop.label, mention(thing, rng)))
        return Question(text, (fact.spans["short"], second.spans["short"]), "two")
    if chance < 0.14 and "sentence" in fact.spans and fact.prop.bare:
        wording = rng.choice(
            [
                "What is said about the {} of {}?",
                "What do the documents say on the {} of {}?",
                "What does it say about {}, {}?",
            ]
        )
        text = wording.format(fact.prop.label, mention(thing, rng))
        return Question(text, (fact.spans["sentence"],), "sentence")
    return Question(ask(thing, fact.prop, rng), (fact.spans["short"],), "short")


def _unanswerable(builder: _Builder, fact: _Fact) -> Question | None:
    """A near miss: a property of this thing that is not stated, or this property of a thing that does not occur."""
    rng, thing = builder.rng, fact.thing
    untold = [p for p in thing.genre.properties if p.label not in thing.facts]
    if untold and rng.random() < 0.6:
        return Question(ask(thing, rng.choice(untold), rng), (), "other-property")
    names = {t.variables["name"] for t in builder.things}
    stranger = make_thing(thing.genre, rng, like=thing)
    if stranger.variables["name"] in names:
        return None
    return Question(ask(stranger, fact.prop, rng), (), "other-thing")


def main(argv: list[str] | None = None) -> None:
    """Write contexts as JSON lines until `--questions` are reached; the last line printed is a JSON summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    rng, made, contexts, started = random.Random(args.seed), 0, 0, time.perf_counter()
    with args.out.open("w") as out:
        while made < args.questions:
            context = generate_context(rng, rng.randint(1, 12), rng.randint(2, 10))
            rows = [{"question": q.text, "kind": q.kind, "spans": [[s.passage, s.start, s.text] for s in q.spans]}
                    for q in context.questions]  # fmt: skip
            out.write(json.dumps({"passages": context.passages, "questions": rows}, ensure_ascii=False) + "\n")
            made, contexts = made + len(rows), contexts + 1
            if contexts % 5000 == 0:
                print(f"{made} questions in {contexts} contexts", flush=True)
    seconds = time.perf_counter() - started
    print(json.dumps({"questions": made, "contexts": contexts, "contexts_per_s": round(contexts / seconds, 1)}))


if __name__ == "__main__":
    main()
