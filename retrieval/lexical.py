"""Normalises text for the lexical index, and turns queries into terms.

A word is a run of letters and digits. Chinese and Japanese have no spaces, so their characters are indexed separately
and searched as pairs. Stemming and ranking are in words.py.
"""

import itertools
import re
import unicodedata

MAX_QUERY_TERMS = 64
_MAX_QUERY_CHARS = 10_000
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED_CHAR = re.compile(f"[{_UNSPACED}]")
_PIECE = re.compile(f'([{_UNSPACED}]+)|([^\\s,;()\\[\\]{{}}<>|?!"“”„«»…，。、？！{_UNSPACED}]+)')
_WORD = re.compile(r"[^\W_]+")
_MARKS = re.compile("[\u0300-\u036f]")
_CODE = re.compile(r"[^\W\d_].*\d|\d.*[^\W\d_]")
_IDENTIFIER = re.compile(r"[\d_.:@#=\\]")
# Words in nearly every English passage, which take most of a query's time and do not help ranking.
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a about an and are as at be been but by can could did do does for from had has have how i if in into is it "
        "its me my of on or our should so than that the their them then there these they this to us was we were what "
        "when where which who why will with would you your"
    )
)


def index_text(text: str) -> str:
    """The text to index: ligatures, full-width characters and accents folded, CJK characters separated."""
    if text.isascii():
        return text
    bare = _MARKS.sub("", unicodedata.normalize("NFKD", text))
    return _UNSPACED_CHAR.sub(r" \g<0> ", unicodedata.normalize("NFC", bare))


def query_terms(text: str) -> list[str]:
    """The terms of a query, each a word or a phrase of words separated by spaces; without stop words, unless there are
    no others.

    Words joined by dots, dashes or underscores (`max_model_len`, `ERR-4012`, `3.2.1`) become a phrase; hyphenated words
    are also searched individually.
    """
    terms: dict[str, None] = {}
    for unspaced, piece in _PIECE.findall(unicodedata.normalize("NFKC", text[:_MAX_QUERY_CHARS])):
        terms.update(dict.fromkeys(_pair_terms(unspaced) if unspaced else _piece_terms(piece)))
        if len(terms) >= MAX_QUERY_TERMS * 2:
            break
    wanted = [term for term in terms if term not in _STOP_WORDS] or list(terms)
    return wanted[:MAX_QUERY_TERMS]


def query_identifiers(text: str) -> list[str]:
    """The terms of a query that are codes of letters and digits, such as `ERR-4012`, which have no synonyms."""
    pieces = (piece for _, piece in _PIECE.findall(unicodedata.normalize("NFKC", text[:_MAX_QUERY_CHARS])))
    codes = (" ".join(_WORD.findall(piece.lower())) for piece in pieces if _CODE.search(piece))
    return list(dict.fromkeys(codes))[:MAX_QUERY_TERMS]


def _piece_terms(piece: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(piece)]
    if len(words) > 1 and words[-1] == "s" and piece[-2:-1] in "'’":
        words.pop()  # the library's -> library
    if len(words) < 2:
        return words
    phrase = " ".join(words)
    return [phrase] if _IDENTIFIER.search(piece.strip(".:")) else [phrase, *(w for w in words if len(w) > 1)]


def _pair_terms(characters: str) -> list[str]:
    if len(characters) == 1:
        return [characters]
    return [f"{first} {second}" for first, second in itertools.pairwise(characters)]
