"""Plain text, and formats treated as such. No headings, no pages."""

from ingest.parse import ParseError
from ingest.parse.decode import UndecodableText, decode_text, normalize_text
from retrieval.parsed import ParsedDocument


def parse_text(data: bytes, media_type: str = "text/plain") -> ParsedDocument:
    """Decode and normalize the text, otherwise unchanged. Raises ParseError undecodable_text."""
    return ParsedDocument(text=read_text(data), media_type=media_type)


def read_text(data: bytes, declared: str | None = None) -> str:
    """Decode and normalize. Raises ParseError undecodable_text."""
    try:
        return normalize_text(decode_text(data, declared=declared))
    except UndecodableText as error:
        raise ParseError("undecodable_text", f"this is no readable text: {error}; save the file as UTF-8") from error
