"""Rewords questions: other question forms, synonyms, keyword style, a missing question mark.

Generated questions repeat the words of their source sentences; people do not. Start at `rephrase`.
"""

from __future__ import annotations

import random
import re

from model.train.cloze import STOPWORDS

FORMS = (
    (r"^What is the name of the (\w+) (?:that|which) ", (r"Which \1 ", r"What \1 ")),
    (r"^What is the name of the (\w+ ?\w*) used to ", (r"Which \1 is used to ", r"What \1 can I use to ")),
    (r"^What is the name of ", (r"What is ", r"How is the name of ", r"By what name goes ")),
    (r"^What is the purpose of (.+)\?$", (r"What is \1 for?", r"What is \1 used for?", r"For what does one use \1?")),
    (r"^What is (.+) used for\?$", (r"What is the purpose of \1?", r"What is \1 for?", r"What do people use \1 for?")),
    (r"^What does (.+) do\?$", (r"What is the effect of \1?", r"What is \1 good for?", r"What is done by \1?")),
    (r"^What does (.+) mean\?$", (r"What is the meaning of \1?", r"What is meant by \1?", r"What does \1 stand for?")),
    (r"^What is (?:an?|the) (\w+(?: \w+)?)\?$", (r"What does the term \1 mean?", r"Explain \1.")),
    (r"^What (command|option|function|file|variable|parameter|method|class|version|type|kind|tool|format|flag|language|"
     r"package|module|value|protocol|directive) ", (r"Which \1 ",)),
    (r"^How do I ", ("How can I ", "How to ", "What do I have to do to ", "How does one ", "What is the way to ")),
    (r"^How can I ", ("How do I ", "How to ", "How would you ", "In what way can I ")),
    (r"^How many ", ("What is the number of ", "How many ")),
    (r"^When was ", ("On what date was ", "In which year was ", "At what time was ")),
    (r"^Who (\w+ed|wrote|made|built) ", (r"Which person \1 ", r"Who was it that \1 ")),
    (r"^Where (is|are) (.+) (?:located|stored|found|kept)\?$", (r"In which place \1 \2?", r"Where do I find \2?")),
    (r"^Why ", ("For what reason ", "What is the reason why ", "How come ")),
    (r"^What happens (if|when) ", (r"What is the result \1 ", r"What will be the consequence \1 ")),
    (r"^What (is|are) ", (r"Which \1 ", r"Say what \1 ", r"What exactly \1 ")),
)  # fmt: skip
_FORMS = tuple((re.compile(pattern), forms) for pattern, forms in FORMS)
PREFIXES = (
    "Tell me: ",
    "Please tell me: ",
    "Quick question: ",
    "I would like to know: ",
    "Hi, ",
    "Can you say ",
    "Say: ",
)
_GROUPS = """
show display present|remove delete erase drop|create make generate produce|contain hold include|begin start|
end finish stop|get obtain fetch retrieve|choose select pick|change alter modify|allow permit let|need require|
big large|fast quick|error fault failure|specify give state|return give|use employ|find locate|set configure|
prevent avoid stop|check verify test|build construct|run execute launch|send transmit|whole entire complete|
maximum largest highest|minimum smallest lowest|directory folder|method way|purpose aim goal|called named|
used employed|shown displayed presented|removed deleted|created made generated|stored kept saved|
needed required|allowed permitted|specified given stated|returned given|started launched begun|written authored|
allows permits lets|shows displays|removes deletes|creates makes generates|contains holds includes|
returns gives|requires needs|uses employs|provides offers supplies|determines decides controls|
describes explains|defines sets|indicates signals shows|default standard|option flag|parameter argument|
function routine|file|program application|user person|several multiple many|different distinct|
certain particular|automatically by_itself|usually normally|currently now|company firm|document text|
image picture|job task|screen display|keep retain|write record|read|happens occurs
"""
SYNONYMS: dict[str, list[str]] = {}
for _group in _GROUPS.replace("\n", "").split("|"):
    for _word in _group.split():
        SYNONYMS.setdefault(_word, []).extend(w.replace("_", " ") for w in _group.split() if w != _word)
_WORD = re.compile(r"(?<![\w$%./-])[a-z]{3,}(?![\w(./-])")


def rephrase(question: str, rng: random.Random) -> str:
    """The question in other words or another style, often unchanged."""
    if rng.random() < 0.35:
        question = _reform(question, rng)
    if rng.random() < 0.35:
        question = _WORD.sub(lambda m: _synonym(m[0], rng), question)
    style = rng.random()
    if style < 0.06:
        return _keywords(question, rng)
    if style < 0.11:
        return rng.choice(PREFIXES) + question[0].lower() + question[1:]
    if style < 0.19:
        question = question.lower() if style < 0.15 else question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question


def _reform(question: str, rng: random.Random) -> str:
    for pattern, forms in _FORMS:
        if pattern.search(question):
            return pattern.sub(rng.choice(forms), question)
    return question


def _synonym(word: str, rng: random.Random) -> str:
    others = SYNONYMS.get(word)
    return rng.choice(others) if others and rng.random() < 0.5 else word


def _keywords(question: str, rng: random.Random) -> str:
    """The question as a search query: its content words, often with a word for why, when, where, how or who."""
    first = question.split()[0].lower()
    words = [w for w in question.rstrip("?.").split()[1:] if w.lower() not in STOPWORDS]
    if len(words) < 2:
        return question
    asked = {"why": "reason", "when": "when", "where": "where", "how": "how", "who": "who"}.get(first)
    return " ".join([asked, *words] if asked and rng.random() < 0.8 else words)
