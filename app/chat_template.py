"""Applies a checkpoint's chat template, safely: determines where system text, documents and turns go.

Text of users and documents never passes through the template: it is rendered with placeholders, and the result is split
at them. So text cannot inject template markup, and markup is known to be the template's. Documents always come before
the first turn, even if the template would put them before the last one, which would invalidate the cached prefix at
every follow-up. Start at `ChatTemplate.lay_out`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '\n\nQuestion: ' + message.content }}"
    "{% else %}{{ '\n\nAnswer: ' + message.content }}{% endif %}{% endfor %}{{ '\n\nAnswer:' }}"
)
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_MARK = re.compile("( *)\ue000([a-z]+)([0-9]+)\ue001")
_BROKEN = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)  # errors that templates can raise

SlotKind = Literal["system", "document", "message"]
Place = Literal["section", "system", "message"]  # of the documents: the template's own section, or inside a message


class UnusableTemplate(ValueError):
    """A chat template that cannot render system text, documents and turns in this order."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for text. `lead`: spaces before it, to be tokenized together with it."""

    kind: SlotKind
    index: int
    lead: str = ""


Piece = str | Slot


class ChatTemplate:
    """Thread safe. `turn_end`: the template's text between an answer and the next question."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """`tokens`: bos_token etc. Raises UnusableTemplate."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UnusableTemplate(f"the chat template is not valid Jinja: {error}") from error
        self._tokens = dict(tokens)
        self._place = self._choose_place()
        self.turn_end = self._find_turn_end()

    @classmethod
    def load(cls, checkpoint: Path) -> Self:
        """Load from chat_template.jinja or tokenizer_config.json; a plain template if there is neither."""
        config = _read_json(checkpoint / "tokenizer_config.json")
        named = _read_json(checkpoint / "special_tokens_map.json") | config
        tokens = {name: _content(named[name]) for name in _TOKEN_NAMES if named.get(name) is not None}
        return cls(_read_source(checkpoint, config) or PLAIN_TEMPLATE, tokens)

    def lay_out(self, ordinals: Sequence[int], num_messages: int) -> list[Piece]:
        """The template's text and the slots of a prompt, in order.

        `ordinals`: those of its documents. Messages alternate between user and assistant; the first and the last are
        the user's.
        """
        return self._lay_out(self._place, ordinals, num_messages)

    def _lay_out(self, place: Place, ordinals: Sequence[int], num_messages: int) -> list[Piece]:
        head = self._render(place, ordinals, 1)
        if num_messages == 1:
            return head
        whole = self._render(place, (), num_messages)
        return [*head[: _find(head, "message", 0) + 1], *whole[_find(whole, "message", 0) + 1 :]]

    def _render(self, place: Place, ordinals: Sequence[int], num_messages: int) -> list[Piece]:
        system, shown = [_mark("system", 0)], [_mark("document", i) for i in range(len(ordinals))]
        contents = [_mark("message", i) for i in range(num_messages)]
        sections = None
        if place == "section":
            sections = [
                {"title": f"d{ordinal}", "text": mark} for ordinal, mark in zip(ordinals, shown, strict=True)
            ] or None
        elif place == "system":
            system += shown
        else:
            contents[0] = "\n\n".join([*system, *shown, contents[0]])
            system = []
        messages = [{"role": "system", "content": "\n\n".join(system)}] if system else []
        roles = ("user", "assistant")
        messages += [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        return _split(
            self._template.render(
                messages=messages, documents=sections, tools=None, add_generation_prompt=True, **self._tokens
            )
        )

    def _choose_place(self) -> Place:
        places: tuple[Place, ...] = ("section", "system", "message")
        for place in places:
            if self._keeps_order(place):
                return place
        raise UnusableTemplate(
            "the chat template does not show a system text, documents and turns in this order; "
            "correct chat_template.jinja, or remove the template to use a plain one"
        )

    def _keeps_order(self, place: Place) -> bool:
        wanted = [("system", 0), ("document", 0), ("document", 1), *(("message", i) for i in range(3))]
        try:
            pieces = self._lay_out(place, (1, 2), 3)
        except _BROKEN:
            return False
        return [(piece.kind, piece.index) for piece in pieces if isinstance(piece, Slot)] == wanted

    def _find_turn_end(self) -> str:
        pieces = self.lay_out((), 3)
        after = pieces[_find(pieces, "message", 1) + 1]
        return after if isinstance(after, str) else ""


def _environment() -> ImmutableSandboxedEnvironment:
    """Like that of `transformers`, but without `strftime_now`: a date would invalidate all cached prefixes daily."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _mark(kind: SlotKind, index: int) -> str:
    return f"\ue000{kind}{index}\ue001"


def _split(text: str) -> list[Piece]:
    """Split rendered text at the placeholders, without empty pieces."""
    pieces: list[Piece] = []
    end = 0
    for found in _MARK.finditer(text):
        pieces += [text[end : found.start()], Slot(found[2], int(found[3]), found[1])]  # type: ignore[arg-type]
        end = found.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def _find(pieces: Sequence[Piece], kind: SlotKind, index: int) -> int:
    """The index of a slot. Raises UnusableTemplate if the template left it out."""
    for place, piece in enumerate(pieces):
        if isinstance(piece, Slot) and (piece.kind, piece.index) == (kind, index):
            return place
    raise UnusableTemplate(f"the chat template leaves out {kind} {index}")


def _read_source(checkpoint: Path, config: Mapping[str, Any]) -> str | None:
    file = checkpoint / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if not isinstance(source, list):
        return source
    named = {template["name"]: template["template"] for template in source}
    return named.get("rag") or named.get("default")


def _content(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
