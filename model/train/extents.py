"""Normalises where an answer begins and ends in its passage, by one convention for each kind of question.

Reader and rules cut the same answer differently ("because it is old", "it is old"; "sixty", "about sixty developers"),
and a model trained on a mixture cuts at random. Start at `settle`.
"""

from __future__ import annotations

import re

from model.train.lexical import MONTHS, words

_COUNTED = re.compile(r"how (?:many|much|long|old|often|far|large|big)\b", re.I)
_HOW = re.compile(r"how (?!many\b|much\b|long\b|old\b|often\b|far\b|large\b|big\b)", re.I)
_WHAT_IT_DOES = re.compile(r"what (?:does|do|did|will|would|can|could|should) (?P<subject>.+?) do\b", re.I)
_PERSONS = frozenset(("it", "this", "that", "which", "they", "you", "he", "she", "we", "who"))
_VERB = re.compile(r"(?:can|will|must|should|may|would|is|are|was|were|has|have|\w{2,}s|\w{2,}ed)$")

_NUMBER = (
    r"\d[\d,.]*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand"
)
_ROUNDED = re.compile(
    r"\b(?:(?:about|around|approximately|almost|nearly|roughly|over|at (?:least|most)|up to|"
    r"(?:no )?(?:more|less|fewer) than) )+$",
    re.I,
)
_COUNT_OF = re.compile(rf"(?P<count>(?:[a-z]+ ){{0,2}}(?:{_NUMBER}))(?P<of>(?: [\w-]+)+)$", re.I)
_DATE = rf"(?:\d{{1,2}}(?:st|nd|rd|th)? (?:of )?)?(?:{MONTHS})\b|[12]\d\d\d\b|\d{{1,2}}:\d\d"
_ON_A_DATE = re.compile(rf"(?:on|in|at)(?: the)? (?={_DATE})", re.I)
_BEGINNINGS = {  # question word -> words before the answer that become part of it
    "why": r"because(?: of)?|since|so that|in order to|due to|owing to|thanks to|to",
    "how": r"by(?: means of)?|using|via|through|with(?: the help of)?",
    "when": r"(?:(?:right|only|immediately|shortly|just|even) )?"
    r"(?:when|whenever|if|after|before|until|unless|while|during)",
    "where": r"(?:in|at|under|on|into|inside|within|below|above|behind)(?: the| an?)?",
}


def settle(passage: str, start: int, end: int, question: str) -> tuple[int, int]:
    """The span start..end, adjusted to the convention for this kind of question."""
    if _COUNTED.match(question):
        start -= len(found[0]) if (found := _ROUNDED.search(passage[:start])) else 0
        end -= _counted_things(passage[start:end], question)
    elif match := _WHAT_IT_DOES.match(question):
        start = _behind_subject(passage, start, match["subject"])
    elif (asked := _asks(question)) is not None:
        start = _with_beginning(passage, start, asked)
        if asked == "when" and (preposition := _ON_A_DATE.match(passage[start:end])):
            start += len(preposition[0])
    return start, end


def _asks(question: str) -> str | None:
    if _HOW.match(question):
        return "how"
    first = question.split(maxsplit=1)[0].lower()
    return first if first in ("why", "when", "where") else None


def _counted_things(answer: str, question: str) -> int:
    """Length of the counted noun at the end, if the question names it: " developers" in "about sixty developers"."""
    match = _COUNT_OF.fullmatch(answer)
    if match is None or not re.match(r"how many\b", question, re.I):
        return 0
    asked = set(words(question))
    return len(match["of"]) if all(word in asked for word in words(match["of"])) else 0


def _behind_subject(passage: str, start: int, subject: str) -> int:
    """`start`, moved back to the verb if one stands between the subject and the answer."""
    subjects = set(words(subject)) | _PERSONS
    clause = re.split(r"[.,;:!?\n|]\s", passage[:start])[-1]
    before = list(re.finditer(r"\S+", clause))[-3:]
    for place in range(len(before) - 2, -1, -1):
        said = words(before[place][0]) or [before[place][0].lower()]
        if said[-1] in subjects:
            moved = _VERB.match(before[place + 1][0])
            return start - len(clause) + before[place + 1].start() if moved else start
    return start


def _with_beginning(passage: str, start: int, asked: str) -> int:
    if asked == "where" and not re.match(r"the\b|an?\b|[a-z]+\b(?![/.:])", passage[start:]):
        return start  # names of places and files take no preposition
    match = re.search(rf"\b(?:{_BEGINNINGS[asked]}) $", passage[:start], re.I)
    return match.start() if match else start
