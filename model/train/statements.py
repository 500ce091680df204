"""Rule-based questions from declarative sentences, whose answers are spans of the sentence.

A rule (statement_rules.txt) is a pattern for a sentence and the questions it answers, each with the group that is the
answer. Patterns are narrow on purpose; sentences that match none are skipped. Start at `facts_of`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from model.train.cloze import SENTENCE_END, STOPWORDS
from model.train.lexical import MONTHS
from model.train.sources import read_word_lists


@dataclass(frozen=True, slots=True)
class Fact:
    """A question, its literal answer and the answer's offset; `frame` is the question without its subject."""

    kind: str
    frame: str  # with {s} in place of the subject
    subject: str
    answer: str
    start: int

    @property
    def question(self) -> str:
        return self.frame.replace("{s}", self.subject)


_WORDS = {
    name: frozenset(words) for name, words in read_word_lists(Path(__file__).parent / "statement_words.txt").items()
}
VERBS, _GENERAL = _WORDS["verbs"], _WORDS["general"]
_MADE = {word: word for word in _WORDS["made"]} | {"written": "wrote", "maintained": "maintains"}
_TOKEN = r"[\w'’“”\"`./+#$<>\[\]*@%&=~^-]*[\w'’”\"`>\]*+#$%]"
_LEADS_TO = (
    "connected attached added assigned linked sent bound mapped related compared limited converted moved copied set"
)
_PARTS = {
    "SUBJECT": rf"(?P<s>{_TOKEN}(?: {_TOKEN}){{0,6}}?(?:\(\))?)",
    "CLAUSE_A": r"(?P<a>[^;:?!|]{3,170}?)",
    "CLAUSE_O": r"(?P<o>[^;:?!|]{3,170}?)",
    "END": r"(?=$|[;:]|\. |, (?:and|but|which|so|while|although|though|whereas|because|since|or|where|who|with|unless)"
    r"\b| \()",
    "AUX": "(?P<x>is|are|was|were)",
    "MODAL": "(?P<x>is|are|was|were|can|cannot|could|should|must|will|may|has|have)",
    "V3": f"(?P<v>{'|'.join(f'{v}e?s' if v[-1] != 'y' else f'{v[:-1]}(?:y|ie)s' for v in sorted(VERBS))}|has)",
    "PARTICIPLE": r"(?:\w{3,}ed|\w*(?:written|given|taken|chosen|hidden|broken|driven|known|shown|drawn|thrown|born|"
    r"run|set|put|built|sent|kept|found|held|made|sold|read|left|lost|meant|bound|split|called))",
    "PLACED": "(?:located|stored|found|kept|installed|defined|documented|described|held|placed|written|listed|built)",
    "MADE": "|".join(_MADE),
    "NOUNS": "|".join(sorted(_WORDS["nouns"])),
    "TO": "|".join(rf"(?<={word} )to" for word in _LEADS_TO.split()),
    "DATE": rf"(?:(?:\d{{1,2}} )?(?:{MONTHS})(?: \d{{1,2}},?)? (?:1[5-9]|20)\d\d|(?:1[5-9]|20)\d\d)",
    "NAME": r"(?:[A-Z][\w'’-]+|[A-Z]\.)(?: (?:[A-Z][\w'’-]+|[A-Z]\.|von|van|de|der)){0,3}",
    "COUNT": "(?:(?:up to|at least|at most|about|over|more than|only|exactly|approximately|nearly) )?"
    r"(?:\d[\d,.]*\d|\d|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|fifty|hundred)",
}
_BAD_ANSWER = re.compile(
    r"^(?:been|being|to have|to be|specified|using|now|had|if|how|when|where|why|what|it|this|that|these|those|they|"
    r"them|he|she|not|as follows|the following|one of|such|so|more|the same|similar|described|the case|true that|shown|"
    r"only|just|through|of|in use|up|coming|based)\b|Prof$|^.{0,2}$|"
    r"\b(?:as follows|the following|below|above|this section|e\.g|i\.e)\b"
)
_LEANING = re.compile(
    r"\b(?:this|these|those|above|below|following|previous|it|they|them|its|their|he|she|his|her|here|such|example)\b",
    re.I,
)


@cache
def rules() -> tuple[tuple[str, re.Pattern[str], tuple[tuple[str, str], ...]], ...]:
    """(kind, pattern, (question, group of its answer) pairs) of each rule."""
    found: list[tuple[str, list[str], list[tuple[str, str]]]] = []
    for line in (Path(__file__).parent / "statement_rules.txt").read_text().splitlines():
        if line.startswith("  ? "):
            group, _, question = line[4:].partition(" ")
            found[-1][2].append((question, group))
        elif line.startswith(" "):
            found[-1][1].append(line.strip(" ").replace("<_>", " "))
        elif line and not line.startswith("#"):
            found.append((line, [], []))
    return tuple(
        (kind, re.compile(re.sub("<([A-Z_0-9]+)>", lambda m: _PARTS[m[1]], "".join(pattern))), tuple(forms))
        for kind, pattern, forms in found
    )


def base_of(verb: str) -> str:
    """The infinitive of a third person: specifies -> specify."""
    if verb in ("has", "had"):
        return "have"
    if verb in VERBS or verb.removesuffix(" of") in VERBS:
        return verb
    head, _, tail = verb.partition(" ")
    for stem in (head.removesuffix("s"), head.removesuffix("es"), head.removesuffix("ies") + "y"):
        if stem in VERBS:
            return f"{stem} {tail}".strip()
    return head.removesuffix("s")


def facts_of(text: str) -> Iterator[Fact]:
    """All questions that the rules derive from a passage; each answer begins at text[start]."""
    at = 0
    for sentence in SENTENCE_END.split(text):
        at = text.index(sentence, at)
        for line in sentence.split("\n"):
            start = sentence.index(line) + at
            body = re.sub(r"^(?:[-*•] |\d+[.)] |Note: |Note that )+", "", line)
            start += len(line) - len(body)
            body = body.rstrip(" .!")
            if 25 <= len(body) <= 330 and " | " not in body:
                yield from _facts_of_sentence(body, start)
            elif " | " in body:
                yield from _facts_of_row(body, start)


def _facts_of_sentence(sentence: str, start: int) -> Iterator[Fact]:
    for kind, pattern, forms in rules():
        match = pattern.match(sentence)
        if match is None:
            continue
        groups = match.groupdict()
        subject = groups.get("s")
        if subject is not None and not _good_subject(subject, bare=kind in ("which", "which used")):
            continue
        for form, answer in forms:
            if not answer or _BAD_ANSWER.search(groups[answer]):
                continue
            frame = _frame(form, groups, asks_subject=answer == "s")
            if frame is None or not _asks_enough(frame, subject or ""):
                continue
            span, end = match.span(answer)
            yield Fact(
                kind,
                frame,
                _lower_article(subject) if subject and answer != "s" else "",
                sentence[span:end],
                start + span,
            )


def _facts_of_row(row: str, start: int) -> Iterator[Fact]:
    """Questions for a row `key | meaning`: what the key does, which key does it."""
    key, _, meaning = (part.strip() for part in row.removeprefix("| ").partition(" | "))
    if not (
        re.fullmatch(r"(?:--?|[%$\\/:])?\w[\w.,= /-]*", key)
        and len(key) <= 40
        and 12 <= len(meaning) <= 140
        and "|" not in meaning
    ):
        return
    if _BAD_ANSWER.search(meaning) or len(meaning.split()) < 3 or key.endswith(":"):
        return
    if key.lower() in _GENERAL or key in ("Note", "Example", "Syntax", "Context", "Override", "Status", "Module"):
        return
    kind = "option" if key.startswith("-") else "entry"
    answer = meaning.rstrip(" .")
    lowered = answer[0].lower() + answer[1:]
    at = start + row.index(answer, len(key))
    acts = base_of(lowered.split()[0]) in VERBS
    yield Fact("row", "What does {s} do?" if acts or kind == "option" else "What is {s}?", key, answer, at)
    yield Fact("row", "What does {s} mean?" if not acts else "What is {s} for?", key, answer, at)
    if acts and lowered.split()[0].endswith("s"):
        yield Fact("row key", f"Which {kind} {lowered}?", "", key, start + row.index(key))
        yield Fact("row key", f"What {lowered}?", "", key, start + row.index(key))
    else:
        yield Fact("row key", f"Which {kind} stands for {lowered}?", "", key, start + row.index(key))


def _frame(form: str, groups: dict[str, str | None], asks_subject: bool) -> str | None:
    """The form with everything but the subject filled in; None if the groups do not fit it."""
    g = {name: value or "" for name, value in groups.items()}
    if "{b}" in form:
        g["b"] = base_of(g["v"])
        if g["s"].split()[-1].endswith("s") and not g["s"][0].isupper() and not g["v"].endswith("s"):
            form = form.replace(" does ", " do ")
    if "{o2}" in form:
        g["o2"] = g["o"].removeprefix("to ")
    if "{x1}" in form:
        g["x1"], _, rest = g["x"].partition(" ")
        g["x2"] = f"{rest} " if rest else ""
    if "{x3}" in form:
        g["x3"], g["o3"] = (
            g["x"].replace("cannot", "can").capitalize(),
            re.sub(r"^(?:not|never|always|only) ", "", g["o"]),
        )
    if "{r1}" in form:
        g["r1"] = g["r"].capitalize()
    if "{w}" in form:
        g["w"] = _MADE[g["p"]]
    if "{h}" in form:
        first = g["a"].split()[0].lower()
        g["c1"], g["h"] = g["c"].lower(), "should I do" if first in VERBS or first in _WORDS["orders"] else "happens"
        if first.endswith("ing") or not re.search(r"\b(?:is|are|was|has|have|can|you|\w+s|\w+ed)\b", g["o"]):
            return None
    if "{u1}" in form:
        g["u1"] = {"in size": "big", "in length": "long", "": "long"}.get(g["u"], g["u"])
    if not asks_subject:
        g["s"] = "{s}"
    return re.sub(r"\{(\w+)\}", lambda m: g[m[1]] if m[1] != "s" or asks_subject else "{s}", form).replace("  ", " ")


def _good_subject(subject: str, bare: bool = False) -> bool:
    """Whether it is specific: no pronoun, no verb inside, at least one identifying word."""
    words = [w.strip("\"'“”‘’`()[]<>.,") for w in subject.split()]
    low = [w.lower() for w in words]
    if (
        not low
        or low[0] in _WORDS["not_subject"]
        or any(w in _WORDS["verbs_inside"] for w in low)
        or low[-1] in STOPWORDS - _GENERAL
    ):
        return False
    if (
        low[0] in VERBS
        or low[0].endswith(("ly", "ing", "ed"))
        or re.match(r"\d|\w?[/.]|[A-Z] [A-Z]|\*", subject)
        or subject.count("(") != subject.count(")")
    ):
        return False
    if low[-1] in ("to", "not", "also", "only", "always", "usually", "often", "currently", "then"):
        return False
    if bare:
        return len(low[0]) > 1 and low[0] not in _GENERAL | STOPWORDS and not low[0].endswith(("ion", "ed", "al"))
    return any(w not in STOPWORDS and w not in _GENERAL and len(w) > 2 for w in low)


def _asks_enough(frame: str, subject: str) -> bool:
    """Whether it has two content words, or one that is a name or a code, and no reference to its surroundings."""
    question = frame.replace("{s}", subject)
    if _LEANING.search(question):
        return False
    words = re.findall(r"[\w.$%/-]+", question)[1:]
    telling = [w for w in words if w.lower() not in STOPWORDS and w.lower() not in _GENERAL and len(w) > 2]
    coded = any(re.search(r"[\d_/$%-]|[a-z][A-Z]|^[A-Z]{2,}$", w) for w in words)
    return len(telling) >= 2 or (len(telling) == 1 and (coded or telling[0][0].isupper()))


def _lower_article(subject: str) -> str:
    first, _, rest = subject.partition(" ")
    return f"{first.lower()} {rest}" if rest and first in ("The", "A", "An", "Each", "Every") else subject
