"""The Debian packages whose text is used for training, and those that are excluded.

`EXCLUDED` belongs to an independent test and is never read. `HELD_OUT`, the source of the project's own test questions,
is kept out of all training and development data. Caps (MB of clean text) keep long API references from dominating.
The lists are in packages.txt.
"""

import hashlib
from pathlib import Path


def read_word_lists(path: Path) -> dict[str, list[str]]:
    """Word lists by name, from a file of `name:` lines with indented words below; `#` starts a comment."""
    lists, name = dict[str, list[str]](), ""
    for line in path.read_text().splitlines():
        if line.startswith(" "):
            lists[name] += line.split()
        elif line and not line.startswith("#"):
            name = line.rstrip(":")
            lists[name] = []
    return lists


_PACKAGES = read_word_lists(Path(__file__).parent / "packages.txt")
EXCLUDED = frozenset(_PACKAGES["excluded"])
HELD_OUT = tuple(_PACKAGES["held_out"])
TOO_CLOSE = frozenset(_PACKAGES["too_close"])
LIBRARIES = frozenset(_PACKAGES["libraries"])

CAPS_MB = {
    "dict-gcide": 3.0, "dict-wn": 6.0, "openjdk-17-doc": 3.0, "linux-doc-6.1": 6.0, "endless-sky-data": 8.0,
    "wesnoth-1.16-data": 8.0, "anarchism": 6.0, "r-cran-janeaustenr": 6.0, "fortunes": 4.0,
}  # fmt: skip
DEFAULT_CAP_MB = 2.5
LIBRARY_CAP_MB = 1.2


def cap_chars(package: str) -> int:
    """Maximum characters of clean text from this package."""
    default = LIBRARY_CAP_MB if package in LIBRARIES else DEFAULT_CAP_MB
    return int(1e6 * CAPS_MB.get(package, default))


def is_dev_document(source: str, doc: str) -> bool:
    """Whether a document (package and file name) belongs to the development split: 4%, the same for text and pairs."""
    return hashlib.blake2b(f"{source}/{doc}".encode(), digest_size=4).digest()[0] < 10


def training_packages() -> list[str]:
    """All training packages, in the order in which duplicates are resolved. Raises ValueError for one in a test."""
    names = list(dict.fromkeys(n for group in ("prose", "pairs", "manuals", "libraries") for n in _PACKAGES[group]))
    if tested := [n for n in names if n in EXCLUDED or n in HELD_OUT or n in TOO_CLOSE]:
        raise ValueError(f"{', '.join(tested)} must stay out of training; remove from packages.txt")
    return names
