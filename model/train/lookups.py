"""A synthetic language for models of a third of a million parameters: statements about people, and questions.

A document has sentences that each give an attribute of a person a value of three words or digits, among filler
sentences. Questions follow, each for one attribute of one person; the answer is the value, copied literally. First
names, surnames, attributes and value words recur within a document, so that everything has look-alikes. Test documents
are about people that no training document names. Start at `Language.draw`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from model.train.sources import read_word_lists

PAD, DOCUMENT, QUESTION, ANSWER, END = "<pad>", "<document>", "<question>", "<answer>", "<end>"
TEST_EVERY = 5  # one in so many pairs of first name and surname is reserved for tests
VALUE_WORDS = 3
QUESTION_TOKENS = 16  # maximum, including the answer
# Statement and question of each attribute: {e} is the person, {v} the value.
ATTRIBUTES = (
    (("the code of {e} is {v}", "{e} was given the code {v}"), ("which code does {e} have", "{e} code")),
    (("{e} lives at {v}", "the home of {e} is at {v}"), ("where does {e} live", "{e} home")),
    (("{e} paid {v} for it", "the price for {e} was {v}"), ("how much did {e} pay", "{e} price")),
    (("{e} works with {v}", "at work {e} has {v}"), ("what does {e} work with", "{e} work")),
    (("in spring {e} saw {v}", "there was {v} when {e} came in spring"), ("what did {e} see in spring", "{e} spring")),
    (("{e} calls the boat {v}", "the boat of {e} is named {v}"), ("what is the boat of {e} called", "{e} boat")),
)
IDLE = ("the {n} waits for the {m}", "no {n} is without a {m}", "every {n} needs the {m}", "a {n} and a {m} were there")


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, and the (start, end) of each answer, which follows its `<answer>`."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Language:
    """The vocabulary, and documents with questions in it."""

    def __init__(self) -> None:
        words = read_word_lists(Path(__file__).parent / "words.txt")
        self.first, self.last, self.nouns = words["first_names"][:64], words["surnames"][:64], words["nouns"][:48]
        self.values = [*"0123456789", *(name.lower() for name in words["place_heads"][:54])]
        forms = [*IDLE, *(form for attribute in ATTRIBUTES for kind in attribute for form in kind)]
        plain = [word for form in forms for word in form.split() if "{" not in word]
        marks = [PAD, DOCUMENT, QUESTION, ANSWER, END, "."]
        self.words = list(dict.fromkeys([*marks, *plain, *self.first, *self.last, *self.nouns, *self.values]))
        self.id_of = {word: i for i, word in enumerate(self.words)}

    def draw(self, rng: random.Random, tokens: int, idle: float, questions: int, test: bool = False) -> Row:
        """A row of at most `tokens`; a share `idle` of its sentences is filler, all but one at 1 (needle search)."""
        facts: dict[tuple[str, int], str] = {}
        sentences: list[list[int]] = []
        room = tokens - questions * QUESTION_TOKENS - 1
        while True:
            key = None
            if sentences and rng.random() < idle:
                noun, other = rng.sample(self.nouns, 2)
                said = self.encode(rng.choice(IDLE).format(n=noun, m=other) + " .")
            else:
                key, value = self._new_fact(rng, facts, test)
                said = self.encode(rng.choice(ATTRIBUTES[key[1]][0]).format(e=key[0], v=value) + " .")
            if len(said) > room:
                break
            if key:
                facts[key] = value
            sentences.append(said)
            room -= len(said)
        rng.shuffle(sentences)
        row = Row(self.encode(DOCUMENT) + [i for said in sentences for i in said], [])
        for person, attribute in rng.sample(list(facts), min(questions, len(facts))):
            asked = rng.choice(ATTRIBUTES[attribute][1]).format(e=person)
            row.ids.extend(self.encode(f"{QUESTION} {asked} {ANSWER}"))
            row.answers.append((len(row.ids), len(row.ids) + VALUE_WORDS))
            row.ids.extend(self.encode(f"{facts[person, attribute]} {END}"))
        return row

    def encode(self, text: str) -> list[int]:
        return [self.id_of[word] for word in text.split()]

    def _new_fact(
        self, rng: random.Random, known: dict[tuple[str, int], str], test: bool
    ) -> tuple[tuple[str, int], str]:
        """A person and attribute not stated yet, and a value."""
        while True:
            first, last = rng.randrange(len(self.first)), rng.randrange(len(self.last))
            key = (f"{self.first[first]} {self.last[last]}", rng.randrange(len(ATTRIBUTES)))
            if ((first + last) % TEST_EVERY == 0) == test and key not in known:
                return key, " ".join(rng.choices(self.values, k=VALUE_WORDS))
