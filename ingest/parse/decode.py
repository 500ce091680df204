"""Decodes bytes of unknown encoding, and normalizes text for storage."""

import codecs
import re
import unicodedata

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: its BOM starts with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_DIVIDERS = re.compile(r"[\xad\u2060\ufeff](?!\n)")
_SAMPLE_BYTES = 64 * 1024
_MAX_CONTROL_SHARE = 0.01
_COMMON = ("cp1252", "cp1250", "iso8859_2")
_NEAR_CHAOS = 0.08


class UndecodableText(ValueError):
    """The bytes are not text in any of the supported encodings."""


def decode_text(data: bytes, *, declared: str | None = None, truncated: bool = False) -> str:
    """Decode text: by byte order mark, as UTF-8, as `declared` (in a meta tag), as UTF-16 without BOM, or in the
    likeliest legacy encoding. `truncated`: the data may end within a character. Raises UndecodableText.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return _decode_whole(data[len(bom) :], encoding, truncated)
    if b"\x00" in data[:_SAMPLE_BYTES]:
        return _decode_whole(data, _utf16_without_bom(data[:_SAMPLE_BYTES]), truncated)
    try:
        return _check_control(codecs.getincrementaldecoder("utf-8")().decode(data, final=not truncated))
    except UnicodeDecodeError:
        pass
    if declared:
        try:
            return _check_control(data.decode(declared, "replace"))
        except LookupError:
            pass
    return _check_control(data.decode(_guess_legacy(data), "replace"))


def normalize_text(text: str, *, keep_soft_hyphens: bool = False) -> str:
    """The form in which text is stored and to which all offsets refer: NFC, line feeds only, no NUL, no surrogates, and
    no invisible characters within lines that only control where words may be broken, as they would split words."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    text = text.encode("utf-8", "replace").decode("utf-8")
    if not keep_soft_hyphens:
        text = _DIVIDERS.sub("", text)
    return unicodedata.normalize("NFC", text)


def _decode_whole(data: bytes, encoding: str, truncated: bool) -> str:
    try:
        return _check_control(codecs.getincrementaldecoder(encoding)().decode(data, final=not truncated))
    except UnicodeDecodeError as error:
        raise UndecodableText(f"not valid {encoding} at byte {error.start}") from error


def _utf16_without_bom(sample: bytes) -> str:
    """Detect the byte order of UTF-16: Western text has NULs in every second byte. Raises UndecodableText."""
    pairs = len(sample) // 2
    even, odd = sample[0 : 2 * pairs : 2].count(0), sample[1 : 2 * pairs : 2].count(0)
    if pairs and odd > 0.4 * pairs and even < 0.02 * pairs:
        return "utf-16-le"
    if pairs and even > 0.4 * pairs and odd < 0.02 * pairs:
        return "utf-16-be"
    raise UndecodableText(f"a NUL byte at position {sample.index(0)}")


def _check_control(text: str) -> str:
    sample = text[:_SAMPLE_BYTES]
    found = len(_CONTROL.findall(sample))
    if found > _MAX_CONTROL_SHARE * len(sample):
        raise UndecodableText(f"{found} control characters in the first {len(sample)}")
    return text


def _guess_legacy(data: bytes) -> str:
    """Guess by charset-normalizer on a sample; by default Windows-1252, or Latin-1 if there are bytes it lacks.

    Of equally good encodings charset-normalizer returns the alphabetically first, so a common one of similar quality is
    preferred.
    """
    from charset_normalizer import from_bytes

    first = next((i for i, byte in enumerate(data) if byte > 127), 0)  # ASCII before it is no evidence
    sample = data[max(0, first - 1024) :][: 16 * 1024]
    matches = [m for m in from_bytes(sample) if not m.encoding.startswith(("ascii", "utf_"))]
    if not matches:
        return "cp1252" if not set(data) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin-1"
    best = matches[0]
    near = [m for m in matches if m.chaos <= best.chaos + _NEAR_CHAOS and m.coherence >= best.coherence]
    fitting = {encoding for match in near for encoding in match.could_be_from_charset}
    return next((encoding for encoding in _COMMON if encoding in fitting), best.encoding)
