"""E-mail (.eml): subject as heading, who and when, the text, then the attachments by name, with their text if they
are text. Other attachments are only named.
"""

import email
from collections.abc import Iterator
from email import policy
from email.message import EmailMessage

from ingest.parse import ParseError
from ingest.parse.blocks import BlockWriter
from ingest.parse.html import parse_html
from ingest.parse.text import read_text
from retrieval.types import ParsedDocument

MEDIA_TYPE = "message/rfc822"
_HEADERS = ("From", "To", "Cc", "Date")
_MAX_DEPTH = 8  # of messages within messages
_MAX_PARTS = 1_000


def parse_mail(data: bytes) -> ParsedDocument:
    """Read one message. Raises ParseError broken_eml."""
    try:
        message = email.message_from_bytes(data, policy=policy.default)
        writer = BlockWriter()
        _write_message(writer, message, depth=1)
        return writer.finish(MEDIA_TYPE)
    except (ParseError, MemoryError):
        raise
    except Exception as error:  # the email package and its codecs fail in many ways on bad input
        raise ParseError(
            "broken_eml",
            f"the message is damaged ({type(error).__name__}: {str(error)[:200]}); save it again from the mail program",
        ) from error


def _write_message(writer: BlockWriter, message: EmailMessage, depth: int) -> None:
    writer.end_block()
    writer.add(_header(message, "Subject") or "(no subject)")
    writer.end_heading(depth)
    for name in _HEADERS:
        if value := _header(message, name):
            writer.add_line(f"{name}: {value}")
    writer.end_block()
    body = message.get_body(preferencelist=("plain", "html"))
    if body is not None:
        _write_text(writer, body)
    for number, part in enumerate(_attachments(message, body)):
        if number == _MAX_PARTS:
            raise ParseError("too_many_pages", f"the message has over {_MAX_PARTS} attachments; upload them separately")
        _write_attachment(writer, part, depth + 1)


def _header(message: EmailMessage, name: str) -> str:
    """The decoded value; as it stands where it cannot be decoded."""
    try:
        value = str(message.get(name, ""))
    except Exception:  # headers are parsed when they are read, with whatever errors
        value = next((str(raw) for key, raw in message.raw_items() if key.lower() == name.lower()), "")
    return " ".join(value.split())


def _attachments(message: EmailMessage, body: EmailMessage | None) -> Iterator[EmailMessage]:
    """The parts other than the body and its other versions, not going into attached messages."""
    if message is body:
        return
    if not message.is_multipart() or message.get_content_type() == "message/rfc822":
        yield message
        return
    for part in message.iter_parts():
        is_version = message.get_content_type() == "multipart/alternative" and not part.is_multipart()
        if not is_version:
            yield from _attachments(part, body)


def _write_attachment(writer: BlockWriter, part: EmailMessage, depth: int) -> None:
    name = " ".join((part.get_filename() or "").split())
    if part.get_content_type() == "message/rfc822" and depth <= _MAX_DEPTH:
        inner = part.get_payload(0)
        writer.end_block()
        writer.add_line(f"Attachment: {name or 'message'}")
        _write_message(writer, inner, depth)
        return
    if not name and part.get_content_maintype() != "text":
        return  # pictures in the text, signatures
    writer.end_block()
    writer.add(f"Attachment: {name or 'text'}")
    writer.end_heading(depth)
    if part.get_content_maintype() == "text":
        _write_text(writer, part)


def _write_text(writer: BlockWriter, part: EmailMessage) -> None:
    data = part.get_payload(decode=True) or b""
    try:
        if part.get_content_type() == "text/html":
            text = parse_html(data).text
        else:
            text = read_text(data, part.get_content_charset())
    except ParseError as error:
        if error.code not in {"empty_document", "undecodable_text"}:
            raise
        return
    for paragraph in text.split("\n\n"):
        writer.add(paragraph, keep_space=True)
        writer.end_block()
