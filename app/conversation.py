"""Earlier turns of a conversation, and the search query of a follow-up question.

The rule is simple and knows only English function words; docs/architecture.md names its limits. Start at
`standalone_query`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

_FEW_WORDS = 4
_MAX_ADDED_WORDS = 32
_MAX_READ_CHARS = 10_000
_STEM_CHARS = 5  # most inflected forms of a word agree in these
_PIECE = re.compile(r"[^\W_]+")
_WORD = re.compile(r"[^\W_]+(?:[-.'’_][^\W_]+)*")
_PRONOUNS = frozenset(_WORD.findall("he him his she her hers it its they them their theirs this that these those"))
_FUNCTION_WORDS = _PRONOUNS | frozenset(
    _WORD.findall(
        "a about also an and any are as at be been but by can could did do does else for from had has have how i if "
        "in into is me more my no not of ok okay on or our please should so some tell than thanks the then there to "
        "too us was we were what what's when where which who who's whom whose why will with would yes you your"
    )
)
_EMPTY_WORDS = frozenset(_WORD.findall("a an the of to in on at for by with from and is are was were be it its"))
_CHOICES = frozenset(("or", "betwe", "eithe", "both"))  # as `_stems` gives them


@dataclass(frozen=True, slots=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


def alternate_turns(turns: Iterable[Turn]) -> list[Turn]:
    """The turns in strict alternation, as chat templates need them: the first is the user's, adjacent turns of the
    same role are joined."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            joined[-1] = Turn(turn.role, f"{joined[-1].text}\n\n{turn.text}")
        elif joined or turn.role == "user":
            joined.append(turn)
    return joined


def standalone_query(question: str, turns: Sequence[Turn]) -> str:
    """The search query for a question; a follow-up gets the content words of the previous question as well.

    A follow-up is a question with a pronoun or with fewer than four content words.
    """
    asked = (content_words(turn.text) for turn in reversed(turns) if turn.role == "user")
    before = next((words for words in asked if words), [])
    own = content_words(question)
    if len(own) >= _FEW_WORDS and _PRONOUNS.isdisjoint(_words(question)):
        return question
    known = {word.lower() for word in own}
    return " ".join([question, *(word for word in before if word.lower() not in known)])


def missing_words(question: str, texts: Iterable[str]) -> float:
    """Share of the question's content words that occur in none of the texts, in any form; 0 if it has none."""
    wanted = {stem for word in content_words(question) for stem in _stems(word)}
    return len(wanted - {stem for text in texts for stem in _stems(text)}) / max(1, len(wanted))


def only_repeats(question: str, text: str) -> bool:
    """Whether the text only repeats words of the question, and the question offers no choice ("red or green")."""
    known, said = {*_stems(question)}, {*_stems(text)}
    return bool(said) and known.isdisjoint(_CHOICES) and said <= known | _EMPTY_WORDS


def _stems(text: str) -> Iterable[str]:
    return (piece.lower()[:_STEM_CHARS] for piece in _PIECE.findall(text))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text[:_MAX_READ_CHARS])]


def content_words(text: str) -> list[str]:
    """The distinct content words of a text, in order."""
    words = dict.fromkeys(word for word in _WORD.findall(text[:_MAX_READ_CHARS]))
    return [word for word in words if word.lower() not in _FUNCTION_WORDS][:_MAX_ADDED_WORDS]
