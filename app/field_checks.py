"""Validators of request fields and settings; each returns its value or raises ValueError with the reason."""

import re
from pathlib import Path

_SURROGATE = re.compile("[\ud800-\udfff]")


def in_plain_words(message: str) -> str:
    """A pydantic message in plain words, such as "must be a whole number"."""
    said = re.sub(
        r"^(?:Input|String|List|Value) should (be|have|match)", r"must \1", message.removeprefix("Value error, ")
    )
    said = re.sub(r"a valid integer(, .*)?$", "a whole number", said.replace(" after validation", ""))
    said = re.sub(r"a valid number(, .*)?$", "a number", re.sub(r"a valid boolean(, .*)?$", "true or false", said))
    said = said.replace("Unable to parse input string as an integer, exceeded maximum size", "has too many digits")
    said = said.replace("must be a valid string", "must be text").replace("must be a valid list", "must be a list")
    return said.replace("Field required", "is missing")


def plain(text: str) -> str:
    """Text that can be stored in the database and in JSON."""
    if "\x00" in text:
        raise ValueError("must not contain the character NUL")
    if _SURROGATE.search(text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


def not_blank(text: str) -> str:
    """Text that is not empty or blank."""
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def printable(text: str) -> str:
    """Text without control characters, which is safe on a terminal."""
    if not text.isprintable():
        raise ValueError("must not contain control characters")
    return text


def number(value: object) -> object:
    """A JSON number, not a string or boolean that could be coerced to one."""
    if isinstance(value, str | bool):
        raise ValueError("must be a number")
    return value


def whole_number(value: object) -> object:
    """Like `number`, for integers."""
    if isinstance(value, str | bool):
        raise ValueError("must be a whole number")
    return value


def filterable(value: object) -> object:
    """A value that metadata can be compared with."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float | None) for one in values):
        raise ValueError("must be text, a number, true, false, null, or a list of these")
    return value


def by_key(filters: object) -> object:
    """Filters by metadata key, not the comparison objects that OpenAI's file search takes: these would find nothing."""
    if isinstance(filters, dict) and filters.keys() == {"type", "key", "value"}:
        raise ValueError('must map metadata keys to values: {"key": "value"}; comparison objects are not supported')
    return filters


def from_home(path: Path) -> Path:
    """Expand `~`, which shells leave as it is after `--data-dir=` and in .env files."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("begins with ~, and there is no such home directory") from None
