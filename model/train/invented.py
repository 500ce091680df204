"""Invents the names, numbers, dates and codes that fill the templates of templated.py.

`GENERATORS` maps names to functions `f(rng, *args) -> str`; templates call them as `{int:2:40}`. People, firms and
places are made from syllables or long lists, so that answers cannot be memorized.
"""

import calendar
import random
from collections.abc import Callable
from pathlib import Path

from model.train.sources import read_word_lists

_WORDS = read_word_lists(Path(__file__).parent / "words.txt")
_FIRST, _LAST_A, _LAST_B, _REAL_LAST = (_WORDS[k] for k in ("first_names", "name_heads", "name_tails", "surnames"))
_PLACE_A, _PLACE_B, _FIRM_B = _WORDS["place_heads"], _WORDS["place_tails"], _WORDS["trades"]
_ONSETS, _VOWELS = _WORDS["onsets"], _WORDS["vowels"]
_NOUNS, _VERBS = _WORDS["nouns"], _WORDS["verbs"]
_COLOURS = [colour.replace("_", " ") for colour in _WORDS["colours"]]
_MONTHS, _DAYS = list(calendar.month_name)[1:], list(calendar.day_name)
_CODAS = ["", "", "", "", "", "", "", "n", "r", "s", "l", "x", "m", "k", "t", "nd", "rk", "st", "th", "sk", "v", "ph"]
_NUMBER_WORDS = _WORDS["numbers"]


def _syllables(rng: random.Random, low: int, high: int) -> str:
    while True:
        count = rng.randint(low, high)
        made = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
        if not any(rude in made for rude in _WORDS["rude"]):
            return made


def _coined(rng: random.Random) -> str:
    return _syllables(rng, 2, 3).capitalize()


def _last(rng: random.Random) -> str:
    return rng.choice(_REAL_LAST) if rng.random() < 0.4 else rng.choice(_LAST_A) + rng.choice(_LAST_B)


def _person(rng: random.Random) -> str:
    middle = f" {rng.choice('ABCDEFGHJKLMNPRSTVW')}." if rng.random() < 0.08 else ""
    return f"{rng.choice(_FIRST)}{middle} {_last(rng)}"


def _place(rng: random.Random) -> str:
    name = rng.choice(_PLACE_A) + rng.choice(_PLACE_B) if rng.random() < 0.75 else _coined(rng)
    return rng.choice(["Port ", "New ", "Saint ", "Upper ", "Lower ", "Mount "]) + name if rng.random() < 0.12 else name


def _firm(rng: random.Random) -> str:
    first = rng.choice([_coined(rng), _last(rng), _place(rng), f"{_last(rng)} & {_last(rng)}", rng.choice(_PLACE_A)])
    return (
        f"{first} {rng.choice(_FIRM_B)}"
        if rng.random() < 0.85
        else first + rng.choice([" Ltd", " Inc.", " GmbH", " AG"])
    )


def _model(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPQRSTVWXZ") for _ in range(rng.randint(1, 3)))
    number = rng.choice([rng.randint(2, 99), rng.randrange(100, 1000, 10), rng.randint(100, 9999)])
    ending = rng.choice(["", "", "", "i", "S", " Pro", " Plus", " Mini", "X"])
    return f"{letters}{rng.choice(['-', ' ', ''])}{number}{ending}"


def _integer(rng: random.Random, low: str, high: str, step: str = "1") -> str:
    number = rng.randrange(int(low), int(high) + 1, int(step))
    return f"{number:,}" if number >= 10_000 or (number >= 1000 and rng.random() < 0.5) else str(number)


def _word_number(rng: random.Random, low: str, high: str) -> str:
    number = rng.randint(int(low), int(high))
    return _NUMBER_WORDS[number] if number < len(_NUMBER_WORDS) and rng.random() < 0.7 else str(number)


def _decimal(rng: random.Random, low: str, high: str, places: str = "1") -> str:
    return f"{rng.uniform(float(low), float(high)):.{places}f}"


def _money(rng: random.Random, low: str, high: str) -> str:
    top, bottom = float(high), float(low)
    amount = bottom * (top / bottom) ** rng.random()
    amount = (
        round(amount, 2)
        if amount < 30 and rng.random() < 0.5
        else round(amount / 5) * 5
        if amount > 60
        else round(amount)
    )
    shown = f"{amount:,.2f}" if amount != int(amount) else f"{int(amount):,}"
    style = rng.choice(
        ["${}", "€{}", "£{}", "{} euros", "{} dollars", "${}", "€{}", "EUR {}", "USD {}", "CHF {}", "{} kronor"]
    )
    return style.format(shown)


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1995, 2031)
    style = rng.randrange(5)
    name = _MONTHS[month]
    return (
        f"{day} {name} {year}" if style == 0 else f"{name} {day}, {year}" if style == 1 else f"{day} {name}"
        if style == 2 else f"{year}-{month + 1:02d}-{day:02d}" if style == 3 else f"{name} {day}"
    )  # fmt: skip


def _old_date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1740, 1990)}"


def _time(rng: random.Random) -> str:
    hour, minute = rng.randint(0, 23), rng.choice([0, 0, 15, 30, 45, rng.randint(0, 59)])
    if rng.random() < 0.5:
        return f"{hour:02d}:{minute:02d}"
    past = f":{minute:02d}" if minute or rng.random() < 0.4 else ""
    return f"{(hour - 1) % 12 + 1}{past} {'a.m.' if hour < 12 else 'p.m.'}"


def _duration(rng: random.Random) -> str:
    unit, high = rng.choice(
        [("minute", 90), ("hour", 72), ("day", 90), ("week", 16), ("month", 36), ("working day", 30)]
    )
    number = rng.randint(2, high)
    word = _NUMBER_WORDS[number] if number <= 12 and rng.random() < 0.5 else str(number)
    return f"{word} {unit}s"


def _ident(rng: random.Random) -> str:
    parts = [rng.choice(_NOUNS), rng.choice(_NOUNS + _VERBS)]
    parts += [rng.choice(["limit", "size", "count", "timeout", "path", "mode", "interval", "ratio"])] * (
        rng.random() < 0.6
    )
    return rng.choice(["_", "_", ".", "-"]).join(dict.fromkeys(parts))


def _path(rng: random.Random) -> str:
    root = rng.choice(["/etc", "/var/lib", "/var/log", "/opt", "/srv", "~/.config", "/usr/share", "/usr/local/etc"])
    leaf = rng.choice([".conf", ".log", ".yaml", ".json", ".ini", ".toml", ".db", ".sh", "", "/"])
    return f"{root}/{_syllables(rng, 1, 2)}/{rng.choice(_NOUNS)}{rng.choice(['', '-' + rng.choice(_NOUNS)])}{leaf}"


def _version(rng: random.Random) -> str:
    return f"{rng.randint(0, 24)}.{rng.randint(0, 30)}" + (f".{rng.randint(0, 19)}" if rng.random() < 0.5 else "")


def _code(rng: random.Random) -> str:
    style = rng.randrange(4)
    if style == 0:
        return str(rng.randint(1000, 9_999_999))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 4)))
    if style == 1:
        return f"{letters}-{rng.randint(10, 99999)}"
    if style == 2:
        return f"{letters}{rng.randint(1, 999)}-{rng.choice('ABCDEFXYZ')}{rng.randint(1, 99)}"
    return "-".join(rng.choice([_PLACE_A[rng.randrange(len(_PLACE_A))].lower(), rng.choice(_NOUNS)]) for _ in range(3))


def _host(rng: random.Random) -> str:
    role = rng.choice(["db", "web", "app", "mail", "cache", "node", "gw"])
    return f"{_syllables(rng, 1, 2)}{rng.choice(['', '-'])}{role}{rng.randint(1, 40)}"


def _phone(rng: random.Random) -> str:
    country = rng.choice(["+44", "+1", "0", "+49"])
    return f"{country} {rng.randint(20, 999)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"


GENERATORS: dict[str, Callable[..., str]] = {
    "int": _integer,
    "num": _word_number,
    "dec": _decimal,
    "money": _money,
    "date": _date,
    "olddate": _old_date,
    "time": _time,
    "duration": _duration,
    "day": lambda rng: rng.choice(_DAYS),
    "month": lambda rng: rng.choice(_MONTHS),
    "year": lambda rng, low="1820", high="2024": str(rng.randint(int(low), int(high))),
    "person": _person,
    "first": lambda rng: rng.choice(_FIRST),
    "last": _last,
    "place": _place,
    "firm": _firm,
    "coined": _coined,
    "model": _model,
    "ident": _ident,
    "caps": lambda rng: _ident(rng).replace("-", "_").replace(".", "_").upper(),
    "option": lambda rng: "--" + _ident(rng).replace("_", "-").replace(".", "-"),
    "path": _path,
    "version": _version,
    "code": _code,
    "host": _host,
    "ip": lambda rng: (
        f"{rng.choice(['10', '172', '192'])}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(2, 254)}"
    ),
    "email": lambda rng: f"{rng.choice(_NOUNS)}@{_syllables(rng, 2, 2)}.{rng.choice(['example', 'test', 'invalid'])}",
    "phone": _phone,
    "url": lambda rng: f"https://{_syllables(rng, 2, 2)}.example/{rng.choice(_NOUNS)}",
    "colour": lambda rng: rng.choice(_COLOURS),
    "noun": lambda rng: rng.choice(_NOUNS),
    "verb": lambda rng: rng.choice(_VERBS),
    "letter": lambda rng: rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ"),
}
