"""Reads the templates: kinds of documents (genres), properties of things, and phrasings of statements and questions.

Format of templates/*.txt: `## genre`, `let name = text`, `e` (full mentions), `short` (later mentions), `title`, `fill`
(filler sentences), then properties: `= label`, `V` values, `S` statements, `Q` questions. ` // ` separates variants,
`[a|b]` picks one, `{int:2:9}` calls a generator of invented.py, `{v}` is the value, `{V}` another value of its kind;
`{v0}`, `{E}` and other capital names are capitalized. templated.py makes contexts from them.
"""

import functools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from model.train.invented import GENERATORS

_FOLDER = Path(__file__).parent / "templates"
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@dataclass(frozen=True, slots=True)
class Property:
    """A property of a thing that can be stated and asked for."""

    label: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    bare: bool  # the label is clear by itself, so it may appear in tables and lists


@dataclass(slots=True)
class Genre:
    """A kind of document: names and properties of the things it is about."""

    name: str
    lets: list[tuple[str, str]] = field(default_factory=list)
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    properties: list[Property] = field(default_factory=list)


@dataclass(slots=True)
class Thing:
    """An invented device, firm, person … with its variables and the facts stated about it."""

    genre: Genre
    variables: dict[str, str]
    facts: dict[str, int] = field(default_factory=dict)  # label -> fact number


@functools.cache
def genres() -> tuple[Genre, ...]:
    """All genres of the template files. Raises ValueError, naming the genre and line that cannot be parsed."""
    found: list[Genre] = []
    for path in sorted(_FOLDER.glob("*.txt")):
        for block in re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:]:
            found.append(_parse_genre(block.splitlines()))
    return tuple(found)


def _parse_genre(lines: list[str]) -> Genre:
    genre, parts = Genre(lines[0].strip()), dict[str, str]()
    for line in [*lines[1:], "= "]:
        head, _, rest = line.partition(" ")
        if not line.strip():
            continue
        if head == "let":
            name, _, value = rest.partition(" = ")
            genre.lets.append((name, value))
        elif head in ("e", "short", "title", "fill"):
            genre.forms[head] = _variants(rest.removeprefix("= "))
        elif head in ("V", "S", "Q"):
            parts[head] = rest
        elif head == "=":
            if parts:
                genre.properties.append(_property(genre.name, parts))
            parts = {"label": rest}
        else:
            raise ValueError(f"genre {genre.name}: cannot read line {line!r}")
    return genre


def _property(genre: str, parts: dict[str, str]) -> Property:
    if missing := {"label", "V", "S", "Q"} - parts.keys():
        raise ValueError(f"genre {genre}, property {parts.get('label')}: no {', '.join(sorted(missing))} line")
    questions = _variants(parts["Q"])
    bare = not any(re.search(r"\{(?!e\}|org\}|name\})", q) for q in questions)
    return Property(parts["label"], _variants(parts["V"]), _variants(parts["S"]), questions, bare)


def _variants(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(" // "))


def expand(template: str, rng: random.Random, variables: dict[str, str]) -> str:
    """The template with choices made and slots filled. Raises ValueError for an unknown slot."""
    while "[" in template and (match := _CHOICE.search(template)):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]

    def fill(match: re.Match[str]) -> str:
        name, args = match[1], match[2]
        if name in variables:
            return variables[name]
        if name.lower() in variables and name.isupper():
            return capital(variables[name.lower()])
        if name not in GENERATORS:
            raise ValueError(f"no generator or variable {name!r} for template {template!r}")
        return GENERATORS[name](rng, *(args.split(":") if args else ()))

    return _SLOT.sub(fill, template)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def make_thing(genre: Genre, rng: random.Random, like: Thing | None = None) -> Thing:
    """A new thing; with `like`, of the same kind (bridge, kettle, …) but with another name."""
    variables: dict[str, str] = {}
    for name, template in genre.lets:
        kept = like is not None and name in ("kind", "what", "svc", "prog", "role")
        variables[name] = (
            like.variables[name] if kept and like else expand(rng.choice(_variants(template)), rng, variables)
        )
    return Thing(genre, variables)


def mention(thing: Thing, rng: random.Random, form: str = "e") -> str:
    """A way to refer to the thing: `e` in full, `short` when it is clear which one is meant, `title` for a heading."""
    return expand(rng.choice(thing.genre.forms[form]), rng, thing.variables)


def idle(thing: Thing, rng: random.Random, count: int) -> list[str]:
    """Up to `count` different filler sentences, which state no property."""
    fills = thing.genre.forms["fill"]
    variables = thing.variables | {"short": mention(thing, rng, "short")}
    return [capital(expand(fill, rng, variables)) for fill in rng.sample(fills, k=min(count, len(fills)))]


def ask(thing: Thing, prop: Property, rng: random.Random) -> str:
    """A question for the property in a random wording, sometimes carelessly typed."""
    text = expand(rng.choice(prop.questions), rng, thing.variables | {"e": mention(thing, rng)})
    return _as_typed(capital(text), rng)


def _as_typed(question: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.05:
        return question[0].lower() + question[1:].rstrip("?")
    if chance < 0.08:
        return question.rstrip("?")
    if chance < 0.12:
        lead = rng.choice(["According to the documents, ", "Quick question: ", "I need to know: ", "Please tell me: "])
        return lead + (
            question[0].lower() + question[1:] if not lead.endswith(": ") or rng.random() < 0.5 else question
        )
    return question
